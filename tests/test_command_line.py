"""python -m k2 generate: what lands on stdout and stderr, what ends it, and where it runs."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import random_model, small_config

import k2
from k2.__main__ import main
from k2.tokenizer import tokenizer_files, train_ranks

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def read(path):\n    世界 😀"
MEASURED = re.compile(r"\d+ tokens; the first after \d+\.\d\d s(, then \d+\.\d tokens/s)?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small float32 checkpoint with a tokenizer of 300 ranks."""
    directory = tmp_path_factory.mktemp("model") / "small"
    ranks = train_ranks(["def read(path):\n    return open(path).read()\n" * 4], 300)
    model = random_model(small_config(vocab_size=len(ranks) + 256, max_position_embeddings=128), 0)
    k2.save(model, directory, format="fp32", files=tokenizer_files(ranks))
    return directory


def expected_text(checkpoint: Path, count: int, prompt: str = PROMPT) -> str:
    """The continuation by k2.generate, decoded at once."""
    tokenizer, model = k2.Tokenizer.from_directory(checkpoint), k2.load(checkpoint, dtype=torch.float32)
    return tokenizer.decode(k2.generate(model, tokenizer.encode(prompt), count, stop_ids=tokenizer.stop_ids))


def generate(checkpoint: Path, *arguments: str, count: int = 12) -> int:
    """The command inside this process; its exit status."""
    return main(["generate", "--model", str(checkpoint), "--max-new-tokens", str(count), "--device", "cpu", *arguments])


def run(checkpoint: Path, *arguments: str, code: str = "", count: int = 12, **options) -> subprocess.CompletedProcess:
    """The same in a process of its own, as bytes; `code` runs in it before anything of k2 is imported."""
    command = [sys.executable, "-W", "error", "-c", f"{code}\nimport sys; from k2.__main__ import main; sys.exit(main())"] if code else [sys.executable, "-m", "k2"]
    command += ["generate", "--model", str(checkpoint), "--max-new-tokens", str(count), "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, **options)


# ---- what is printed ----


def test_stdout_has_the_text_and_nothing_else(checkpoint, capfd):
    assert generate(checkpoint, PROMPT) == 0
    out, err = capfd.readouterr()
    assert out == expected_text(checkpoint, 12) + "\n"
    plan, measured = err.splitlines()
    assert str(checkpoint) in plan and "MB of weights as torch.float32 on torch cpu" in plan and plan.endswith(f"prompt of {prompt_length(checkpoint)} tokens")
    assert MEASURED.fullmatch(measured) and measured.startswith("12 tokens; "), measured


def prompt_length(checkpoint: Path) -> int:
    """How many tokens PROMPT has."""
    return len(k2.Tokenizer.from_directory(checkpoint).encode(PROMPT))


ONLY_LINUX_HAS = "import os\nfor name in ('preadv', 'posix_fadvise', 'O_DIRECT', 'sched_getaffinity'):\n    hasattr(os, name) and delattr(os, name)\nimport sys; sys.modules['resource'] = sys.modules['fcntl'] = None"


def test_a_real_process_prints_the_same_without_what_only_linux_has(checkpoint):
    done = run(checkpoint, PROMPT, code=ONLY_LINUX_HAS)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == expected_text(checkpoint, 12) + "\n"
    assert len(done.stderr.decode().splitlines()) == 2 and MEASURED.fullmatch(done.stderr.decode().splitlines()[-1])


def test_the_prompt_may_come_from_a_file_or_from_standard_input_exactly_as_it_stands(checkpoint, capfd, tmp_path, monkeypatch):
    prompt = PROMPT + "\r\n\n  "  # nothing is stripped and no line end is translated
    (tmp_path / "prompt").write_bytes(prompt.encode())
    assert generate(checkpoint, "--prompt-file", str(tmp_path / "prompt")) == 0
    from_file = capfd.readouterr().out
    with open(tmp_path / "prompt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert generate(checkpoint, "-") == 0
    assert from_file == capfd.readouterr().out == expected_text(checkpoint, 12, prompt) + "\n"


def test_numpy_prints_the_same_text_as_torch_in_float32(checkpoint, capfd):
    assert generate(checkpoint, PROMPT, "--dtype", "float32") == 0
    by_torch = capfd.readouterr().out
    assert generate(checkpoint, PROMPT, "--backend", "numpy") == 0
    by_numpy = capfd.readouterr()
    assert by_numpy.out == by_torch == expected_text(checkpoint, 12) + "\n"
    assert "on numpy cpu" in by_numpy.err


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token_are_fine(checkpoint, capfd, backend, count):
    assert generate(checkpoint, PROMPT, "--backend", backend, count=count) == 0
    out, err = capfd.readouterr()
    assert out == expected_text(checkpoint, count) + "\n" and err.splitlines()[-1].startswith(f"{count} tokens; ")


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_the_context_ends_the_text_and_a_longer_prompt_is_refused(checkpoint, capfd, backend):
    assert generate(checkpoint, "\x00" * 127, "--backend", backend, count=9) == 0
    assert capfd.readouterr().err.splitlines()[-1].startswith("2 tokens; ")
    assert generate(checkpoint, "\x00" * 129, "--backend", backend) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: prompt: 129 tokens; expected at most 128")


def test_a_seed_gives_one_text(checkpoint, capfd):
    texts = []
    for seed in "7", "7", "8":
        assert generate(checkpoint, PROMPT, "--temperature", "1.5", "--top-p", "0.95", "--seed", seed) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_the_first_layers_alone_are_another_text_than_the_whole(checkpoint, capfd):
    texts = []
    for flags in (["--layers", "0-1"], ["--layers", "0-2"], []):
        assert generate(checkpoint, PROMPT, *flags) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] != texts[1] == texts[2]
    two, tokenizer = k2.load(checkpoint, dtype=torch.float32, layers=2), k2.Tokenizer.from_directory(checkpoint)
    assert texts[0] == tokenizer.decode(k2.generate(two, tokenizer.encode(PROMPT), 12, stop_ids=tokenizer.stop_ids)) + "\n"


# ---- what is refused, with status 2 and one line ----


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "expected a prompt or --prompt-file, found both or neither"),
        (["x", "--prompt-file", "y"], "expected a prompt or --prompt-file, found both or neither"),
        (["--prompt-file", "no/such/file"], "no/such/file: expected a text file, found nothing"),
        (["--prompt-file", "."], ".: expected a text file, found something else"),
        ([""], "prompt: expected at least one token"),
        (["x", "--temperature", "-1"], "temperature: found -1.0"),
        (["x", "--temperature", "nan"], "temperature: found nan"),
        (["x", "--top-p", "0"], "top_p: found 0.0"),
        (["x", "--backend", "numpy", "--temperature", "1"], "the reference is greedy"),
        (["x", "--backend", "numpy", "--ram", "1GB"], "--ram: found 1GB with --backend numpy"),
        (["x", "--backend", "numpy", "--dtype", "bfloat16"], "--dtype: found bfloat16 with --backend numpy"),
        (["x", "--max-new-tokens", "-1"], "--max-new-tokens: found -1"),
        (["x", "--max-new-tokens", "many"], "generate: argument --max-new-tokens: invalid int value: 'many'. All flags: python -m k2 generate --help"),
        (["x", "--temprature", "1"], "unrecognized arguments: --temprature 1"),
        (["x", "--model", "no/such/model"], "no/such/model"),
        (["x", "--layers", "1-2"], "--layers 1-2: expected the first layers, such as 0-3"),
        (["x", "--layers", "0-9"], "layers: expected 1 to 3 of them, found 10"),
        (["x", "--layers", "all"], "--layers all: expected numbers and ranges"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(checkpoint, capfd, arguments, complaint):
    assert generate(checkpoint, *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: ") and complaint in err.splitlines()[-1], err
    assert "Traceback" not in err


def test_a_prompt_that_is_no_utf8_is_refused_by_byte(checkpoint, capfd, tmp_path):
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    assert generate(checkpoint, "--prompt-file", str(tmp_path / "prompt")) == 2
    assert "expected UTF-8 text, found byte 0xff at 3" in capfd.readouterr().err


# ---- how it ends early ----


def test_ctrl_c_ends_with_130_and_no_traceback(checkpoint, capfd, monkeypatch):
    calls = []

    def interrupt(self, inputs, output):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)

    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: interrupt(m, i, o) if isinstance(m, k2.K2) else None)
    try:
        assert generate(checkpoint, PROMPT) == 130
    finally:
        handle.remove()
    out, err = capfd.readouterr()
    assert out == expected_text(checkpoint, 4) + "\n" and err.endswith("stopped\n") and "Traceback" not in err
    assert any(line.startswith("4 tokens; ") for line in err.splitlines())


def test_a_process_that_gets_sigint_ends_with_130(checkpoint):
    # The process sends it to itself at its third token, so that nothing has to wait.
    code = (
        "import os, signal, k2.__main__ as m\n"
        "class Decoder(__import__('k2.tokenizer').tokenizer.StreamDecoder):\n"
        "    pushed = 0\n"
        "    def push(self, i):\n"
        "        self.pushed += 1\n"
        "        self.pushed == 3 and os.kill(os.getpid(), signal.SIGINT)\n"
        "        return super().push(i)\n"
        "m.Tokenizer.stream = lambda self: Decoder(self)\n"
    )
    done = run(checkpoint, PROMPT, code=code)
    assert done.returncode == 130 and b"Traceback" not in done.stderr and done.stderr.endswith(b"stopped\n"), done.stderr.decode()


def test_ctrl_c_while_torch_is_imported_just_ends_the_process(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError('still here')\n")
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "k2", "generate"], cwd=ROOT, env=environment, preexec_fn=default, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGINT and done.stderr == b"", done.stderr.decode()


def test_a_reader_that_goes_away_is_no_error(checkpoint):
    command = [sys.executable, "-m", "k2", "generate", "--model", str(checkpoint), "--max-new-tokens", "60", "--device", "cpu", "a"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()  # as `| head -c1` does
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 0 and "Traceback" not in err and "BrokenPipe" not in err and "Exception ignored" not in err, err


# ---- where it runs ----


@pytest.mark.parametrize("locale, given_as", [({"LC_ALL": "C", "PYTHONUTF8": "0"}, "argument"), ({"PYTHONIOENCODING": "cp1252"}, "file")])
def test_text_is_utf8_whatever_the_locale_says(checkpoint, tmp_path, locale, given_as):
    # The decoder is made to emit what no ASCII terminal has; the prompt comes as an argument's bytes, and from a file.
    code = f"import k2.tokenizer as t\nt.StreamDecoder.finish = lambda self: {ascii('世界 é 😀')}"
    (tmp_path / "prompt").write_bytes(PROMPT.encode())
    arguments = [PROMPT.encode()] if given_as == "argument" else ["--prompt-file", str(tmp_path / "prompt")]
    done = run(checkpoint, *arguments, code=code, env={**os.environ, **locale}, count=3)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    assert done.stdout.decode("utf-8").endswith("世界 é 😀" + os.linesep), done.stdout
    assert f"prompt of {prompt_length(checkpoint)} tokens" in done.stderr.decode(errors="replace")


def test_help_names_every_command_and_no_command_is_an_error(capfd):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    printed = capfd.readouterr().out
    assert ended.value.code == 0 and all(word in printed for word in ("generate", "train", "evaluate", "bench", "plan", "inspect", "check-layer", "compare", "trace"))
    assert main([]) == 2
    assert "the following arguments are required: COMMAND. All flags: python -m k2 --help" in capfd.readouterr().err
