"""python -m k2 COMMAND. This file only parses, dispatches and prints: text to stdout, all else to stderr."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from . import reference
from .checkpoint import DTYPES
from .config import K2Config, K2Error, printable
from .generation import generate
from .offload import load, parse_size, store_of
from .sampling import Sampler
from .tokenizer import Tokenizer

MINI = Path(__file__).parent / "mini"


def main(arguments=None) -> int:
    """Run one command; 0, or 1 where it compared and found a difference, 2 for something the user can mend, 130 after Ctrl-C."""
    for standard in filter(None, (sys.stdout, sys.stderr)):  # None where the shell closed it
        standard.reconfigure(encoding="utf-8", errors="replace")  # a model's text is Unicode, whatever the locale says
    return status_of(lambda: run_options(parsed(arguments)))


def run_options(options) -> int | None:
    """Run the command that the options name; its status, or None."""
    return options.run(options)


def status_of(action, stopped: str = "stopped", unnamed: str = "standard output") -> int:
    """Call it; the status it gives, 0 for none, or 2 for something the user can mend, said in one line, or 130 after Ctrl-C."""
    try:
        return action() or 0
    except K2Error as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        discard_output()
    except OSError as error:  # what no closer handler knew; most likely a full disk behind `> FILE`
        discard_output()
        print(f"error: {error.filename or unnamed}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def discard_output():
    """Point stdout at nothing: Python flushes it once more at exit, and would fail again."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """argparse, with this project's one line for what it refuses in place of a usage block."""

    def error(self, message):
        """Raise a K2Error."""
        raise K2Error(f"{self.prog.removeprefix('python -m k2 ')}: {message}. All flags: {self.prog} --help")


def path_or_name(text: str) -> str:
    """A path, or a repository's name: no word with a zero byte, which the system would raise a ValueError for."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"found a zero byte in {text[:40]!r}; expected a path or a name")
    return text


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = Parser(prog="python -m k2", description="Kimi K2, built from scratch to be read.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands)
    add_chat(commands)
    add_train(commands)
    add_experiment(commands)
    add_evaluate(commands)
    add_bench(commands)
    add_inspect(commands)
    add_plan(commands)
    add_check_layer(commands)
    add_compare(commands)
    add_trace(commands)
    return parser


def parsed(arguments):
    """The options. argparse takes inspect's patterns only beside the model; those behind a flag come back as unknown."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if options.run is run_inspect and not any(word.startswith("-") for word in rest):
        options.patterns += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def add_generate(commands):
    """python -m k2 generate"""
    sub = commands.add_parser("generate", help="continue a text", description="Continue a text, greedy by default.")
    sub.add_argument("prompt", nargs="?", help="the text to continue; - reads standard input")
    sub.add_argument("--prompt-file", type=path_or_name, metavar="FILE", help="read the prompt from a file instead")
    add_model_flags(sub, max_new_tokens=128, temperature=0.0)
    sub.add_argument("--backend", default="torch", choices=("torch", "numpy"), help="numpy: the float64 reference, greedy")
    sub.set_defaults(run=run_generate)


def add_model_flags(sub, max_new_tokens: int, temperature: float):
    """Which model, where it runs, and how it chooses."""
    sub.add_argument("--model", default=MINI, type=path_or_name, metavar="DIR", help="a checkpoint directory (default: the shipped K2-mini)")
    sub.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"of one answer (default: {max_new_tokens})")
    sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    sub.add_argument("--dtype", default="auto", choices=tuple(DTYPES), help="stored: keep the checkpoint's format at rest")
    sub.add_argument("--ram", metavar="SIZE", help="memory for the weights, such as 3GB; the rest is read from disk when it is asked for (default: what is free)")
    sub.add_argument("--gpu-memory", metavar="SIZE", help="the same on the GPU; experts beyond it wait in RAM, and beyond that on disk")
    sub.add_argument("--compile", action="store_true", help="torch.compile for decode, and for the FP8 experts of prompts, on the CPU, after some seconds of compiling: FP8 gains, bfloat16 depending on the processor (bench --products --compile shows it)")
    sub.add_argument("--experts-on", default="device", choices=("device", "cpu"), help="cpu: with a GPU, experts stay in RAM and compute there; rounds differently, and pays where RAM is faster than the bus")
    sub.add_argument("--layers", metavar="0-N", help="only the first layers of the model, the ones that were fetched; its text then means nothing")
    sub.add_argument("--temperature", type=float, default=temperature, help=f"0 is greedy; K2's own setting is 0.6 (default: {temperature:g})")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int)


def read_prompt(options) -> str:
    """The prompt from the argument, a file or standard input, exactly as it stands."""
    if (options.prompt is None) == (options.prompt_file is None):
        raise K2Error("generate: expected a prompt or --prompt-file, found both or neither. Write: python -m k2 generate \"def \"")
    path = options.prompt_file
    if path is not None and not os.path.isfile(path):
        raise K2Error(f"{path}: expected a text file, found {'something else' if os.path.exists(path) else 'nothing'}. Give an existing file to --prompt-file.")
    source = path or ("standard input" if options.prompt == "-" else "the prompt")
    try:
        if path:
            given = Path(path).read_bytes()
        elif options.prompt == "-":
            given = sys.stdin.buffer.read() if sys.stdin else b""  # None where the shell closed it
        else:
            given = os.fsencode(options.prompt)
        return given.decode("utf-8")
    except OSError as error:
        raise K2Error(f"{source}: expected a text file, could not read it: {error.strerror}. Check its permissions.") from None
    except UnicodeDecodeError as error:
        raise K2Error(f"{source}: expected UTF-8 text, found byte {error.object[error.start]:#x} at {error.start}. Convert it to UTF-8.") from None


def pick_device(name: str) -> torch.device:
    """auto is the GPU if torch sees one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise K2Error("--device cuda: torch sees no CUDA device. Use --device cpu, or install the CUDA build of torch.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


NUMPY_TAKES = {"device": ("auto", "cpu"), "dtype": ("auto", "float32", "float64"), "gpu_memory": (None,), "ram": (None,), "compile": (False,), "temperature": (0.0,)}


def check_flags(options):
    """What argparse cannot see: a negative count, and flags that the reference would have to ignore."""
    if options.max_new_tokens < 0:
        raise K2Error(f"--max-new-tokens: found {options.max_new_tokens}; expected 0 or more.")
    Sampler(options.temperature, options.top_p, options.seed)  # refuses what it cannot take, before a model is loaded
    for name, taken in NUMPY_TAKES.items() if options.backend == "numpy" else ():
        value = getattr(options, name)
        if value not in taken:
            raise K2Error(f"--{name.replace('_', '-')}: found {value} with --backend numpy; expected none: the reference is greedy, in float64 on the CPU, with all weights in memory.")


def run_generate(options):
    """Stream the continuation to stdout; the plan before and the measured line after go to stderr."""
    check_flags(options)
    text, device = read_prompt(options), pick_device(options.device)
    tokenizer = Tokenizer.from_directory(options.model)
    started = time.perf_counter()
    if options.backend == "numpy":
        model = load(options.model, dtype=torch.float32, ram=sys.maxsize, layers=first_layers(options.layers))  # the reference needs all weights in any case
    else:
        model = loaded(options, device)
    ids, store = tokenizer.encode(text), store_of(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{options.model}: {size / 1e6:,.1f} MB of weights as {model.lm_head.weight.dtype} on {options.backend} {device}, "
          f"loaded in {time.perf_counter() - started:.2f} s; prompt of {len(ids)} tokens", file=sys.stderr)  # fmt: skip
    if store:
        print(store.plan(), file=sys.stderr)
    new_ids = numpy_continuation(model, ids, tokenizer, options) if options.backend == "numpy" else generate(
        model, ids, options.max_new_tokens, options.temperature, options.top_p, options.seed, tokenizer.stop_ids)  # fmt: skip
    stream(new_ids, tokenizer)
    if store:
        print(store.statistics.line(), file=sys.stderr)


def first_layers(text: str | None) -> int | None:
    """How many first layers "0-3" asks for: 4."""
    from .part import parse_numbers

    numbers = parse_numbers(text, "--layers") if text is not None else None
    if numbers is not None and numbers != tuple(range(len(numbers))):
        raise K2Error(f"--layers {text}: expected the first layers, such as 0-3; a model cannot begin in its middle. check-layer runs one layer.")
    return len(numbers) if numbers is not None else None


def loaded(options, device: torch.device):
    """The model that the flags of add_model_flags describe."""
    return load(options.model, device, DTYPES[options.dtype], parse_size(options.gpu_memory), parse_size(options.ram),
                first_layers(options.layers), options.compile, options.experts_on)  # fmt: skip


def numpy_continuation(model, ids, tokenizer: Tokenizer, options):
    """The reference on the same weights, widened to float64."""
    generate(model, ids, options.max_new_tokens)  # its checks of the prompt; the iterator it returns is not run
    count = min(options.max_new_tokens, model.config.max_position_embeddings - len(ids) + 1)
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    return reference.generate(model.config, weights, ids, count, tokenizer.stop_ids)


def stream(new_ids, tokenizer: Tokenizer):
    """Print ids as text as they come, then the speed: the first token apart, as it pays for the prompt."""
    decoder, times = tokenizer.stream(), [time.perf_counter()]
    try:
        for i in new_ids:
            times.append(time.perf_counter())
            print(decoder.push(i), end="", flush=True)
    finally:
        print(decoder.finish(), flush=True)
        first = times[1] - times[0] if len(times) > 1 else 0.0
        rate = f", then {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s" if len(times) > 2 else ""
        print(f"{len(times) - 1} tokens; the first after {first:.2f} s{rate}", file=sys.stderr)


def add_inspect(commands):
    """python -m k2 inspect"""
    sub = commands.add_parser("inspect", help="the tensors of a checkpoint, here or on the hub", description="List a checkpoint's tensors and compare them with its config; only headers are read.")
    sub.add_argument("model", type=path_or_name, metavar="PATH_OR_REPO", help="a checkpoint directory, or a repository such as moonshotai/Kimi-K2-Instruct (about 31 MB are read)")
    sub.add_argument("patterns", nargs="*", metavar="PATTERN", help="names of tensors, with * and ?; without one a table of kinds")
    sub.add_argument("--revision", default="main", help="of a repository: a branch, a tag or a commit")
    sub.add_argument("--statistics", action="store_true", help="also what the numbers are like; reads the tensors")
    sub.add_argument("--json", action="store_true")
    sub.set_defaults(run=run_inspect)


def run_inspect(options):
    """The table on stdout; what is not as the config implies ends it with status 2."""
    from . import inspection
    from .checkpoint import Checkpoint
    from .needs import FAMILY
    from .part import check_layout

    if options.model in FAMILY and FAMILY[options.model][1] is None and not os.path.exists(options.model):
        options.model = MINI
    if options.statistics and not os.path.isdir(options.model):
        raise K2Error(f"{options.model}: --statistics reads the tensors; expected a checkpoint directory. Fetch it or a part of it with download_weights.py.")
    layout, part = open_layout(options.model, options.revision)
    check_layout(options.model, layout, part)
    chosen = inspection.rows(layout, options.patterns)
    if options.json:
        print(inspection.as_json(layout, chosen))
    elif options.statistics:
        checkpoint = Checkpoint(options.model, partial=True)
        for row, line in zip(chosen, inspection.table(chosen)):
            print(f"{line}\n    {inspection.statistics(checkpoint, row)}")
    else:
        print("\n".join(inspection.table(chosen) if options.patterns else inspection.summary(layout, part)))


def add_plan(commands):
    """python -m k2 plan"""
    sub = commands.add_parser("plan", help="what a model needs and how fast it runs here, without weights or network",
                              description="Plan a model on this machine, or on one given by flags. Sizes are bytes, such as 3GB; bandwidths are bytes a second. What is not given is measured.")  # fmt: skip
    sub.add_argument("model", nargs="?", type=path_or_name, metavar="NAME_OR_PATH", help="instruct, instruct-0905, base, thinking, k2.5, moonlight, mini, or a config.json; without one the whole family")
    for name in MACHINE:
        sub.add_argument(f"--{name.replace('_', '-')}", metavar="SIZE")
    sub.add_argument("--context", type=int, default=0, metavar="N", help="tokens in the cache (default: 0)")
    sub.add_argument("--hits", type=float, metavar="X", help="share of the chosen experts that is in memory, where you know it; real routing is uneven, 2 to 4 times what fits")
    sub.add_argument("--decode", type=int, metavar="N", help="of a checkpoint's folder: also decode N tokens on the CPU, and print measured beside planned")
    sub.add_argument("--published", action="store_true", help="instead: the speeds that others report, beside the limits of their machines")
    sub.add_argument("--path", type=path_or_name, metavar="DIR", help="where the weights are or will be: its disk is measured (default: the checkpoint's folder if one is given, else this one)")
    sub.add_argument("--json", action="store_true")
    sub.set_defaults(run=run_plan)


def open_layout(model: str, revision: str):
    """The layout of a folder's checkpoint and the part that it is, or those of a repository."""
    from . import hub, inspection
    from .needs import FAMILY
    from .part import Part, part_of

    name = (FAMILY.get(model) or (None, model))[1]
    if os.path.exists(model) or name is None or not hub.REPOSITORY.fullmatch(name):
        return inspection.local_layout(model), part_of(model)
    client = hub.Hub()
    repository = client.repository(name, revision)
    layout, _ = hub.layout_of(client, repository, Part())
    print(f"{repository.name} at {repository.commit}: {client.received:,} bytes read", file=sys.stderr)
    return layout, Part()


MACHINE = ("ram", "gpu_memory", "disk", "ram_bandwidth", "disk_bandwidth", "bus_bandwidth", "gpu_bandwidth")


def run_plan(options):
    """The plan on stdout, the next command last."""
    from . import plan, published
    from .machine import decode_seconds, this_machine
    from .needs import family_config

    if options.published:
        return print(published.page(), end="")
    if options.decode is not None and (options.decode < 1 or not options.model or not os.path.isdir(options.model)):
        raise K2Error(f"--decode: found {options.decode} for {options.model}; expected a number of tokens and a checkpoint's folder.")
    if options.context < 0 or (options.hits is not None and not 0 <= options.hits <= 1):
        raise K2Error(f"--context, --hits: found {options.context}, {options.hits}; expected tokens from 0 and a share from 0 to 1.")
    config = family_config(options.model) if options.model else None
    given = {name: parse_size(getattr(options, name)) for name in MACHINE}
    for name, value in given.items():
        if name.endswith("bandwidth") and value is not None and value < 1:
            raise K2Error(f"--{name.replace('_', '-')}: found {value}; expected bytes a second, such as 7GB.")

    folder = Path(options.path or (options.model if options.model and os.path.isdir(options.model) else "."))

    def planned():
        machine = this_machine(folder, given)
        asked, known = (machine, options.context, options.hits), frozenset(name for name, value in given.items() if value is not None)
        return machine, [plan.plan(options.model, config, *asked, given=known)] if config else plan.whole_family(*asked, known)

    def decoded():
        return decode_seconds(options.model, given["ram"], torch.device("cpu"), options.decode)

    machine, plans = planned()
    if options.json:
        print(plan.as_json(plans, machine))
    elif config:
        print("\n".join([*plan.machine_lines(machine), *plan.needs_lines(config, options.context), *plan.seconds_lines(plans[0], machine, options.context)]))
        if options.decode:
            print(plan.measured_line([(plans[0], decoded()), *((planned()[1][0], decoded()) for _ in range(2))]))
        print(f"next:\n    {plan.next_command(plans[0])}")
    else:
        print("\n".join([*plan.machine_lines(machine), *plan.family_lines(plans, options.context), *plan.advice(plans)]))


def add_check_layer(commands):
    """python -m k2 check-layer"""
    sub = commands.add_parser("check-layer", help="one layer of a checkpoint against the numpy reference", description="Run one layer's tensors, or those that are there, in torch and in numpy on seeded tokens. It checks this code and the "
                              "formats, not the download: both sides read the same bytes, so that wrong but finite ones pass. For those there is download_weights.py --verify, by the hub's hashes.")  # fmt: skip
    sub.add_argument("model", type=path_or_name, metavar="DIR", help="a checkpoint, or a part of one")
    sub.add_argument("layer", type=int, metavar="LAYER")
    sub.add_argument("--experts", metavar="17,203", help="these routed experts (default: the first two that are there)")
    sub.add_argument("--tokens", type=int, default=4, metavar="N")
    sub.add_argument("--seed", type=int, default=0, metavar="N")
    sub.set_defaults(run=run_check_layer)


def run_check_layer(options):
    """A line for each comparison on stdout; an error past its limit ends it with status 2."""
    from . import layer_check
    from .checkpoint import Checkpoint
    from .part import parse_numbers

    if not 1 <= options.tokens <= layer_check.MOST_TOKENS or options.seed < 0:
        raise K2Error(f"--tokens, --seed: found {options.tokens}, {options.seed}; expected 1 to {layer_check.MOST_TOKENS}, and at least 0.")
    experts = parse_numbers(options.experts, "--experts") if options.experts is not None else None
    found = []
    with layer_check.quiet():
        for result in layer_check.results(Checkpoint(options.model, partial=True), options.layer, experts, options.tokens, options.seed):
            print(layer_check.line(result), flush=True)
            found.append(result)
    layer_check.verdict(options.model, options.layer, found)


def add_compare(commands):
    """python -m k2 compare"""
    sub = commands.add_parser("compare", help="the first tensor in which two variants differ", description="Run two variants on the same tokens, a prompt in two chunks and then token by token, and name "
                              "the first tensor that differs by more than rounding. Status 0: none; 1: one.")  # fmt: skip
    for name in "AB":
        sub.add_argument(name.lower(), metavar=name, type=path_or_name, help="torch, numpy, transformers, stored, float32, bfloat16, float64, a checkpoint directory, or mutant:NAME of tests/mutants.py")
    sub.add_argument("--model", default=MINI, type=path_or_name, metavar="DIR", help="a checkpoint directory (default: the shipped K2-mini)")
    sub.add_argument("--prompt", metavar="TEXT", help="what both read (default: three lines of Python)")
    sub.add_argument("--dtype", default="auto", choices=tuple(DTYPES), help="of torch, a directory and mutant:NAME (default: as loaded)")
    sub.add_argument("--ram", metavar="SIZE", help="memory for the weights of these; the rest is read from disk when it is asked for")
    sub.add_argument("--all", action="store_true", help="all tensors, not only those up to the first that differs")
    sub.set_defaults(run=run_compare)


def run_compare(options) -> int:
    """Table and sentence on stdout; 1 where something differs."""
    from . import compare

    prompt = compare.PROMPT if options.prompt is None else options.prompt
    ids = Tokenizer.from_directory(options.model).encode(prompt)
    return compare.compare(options.a, options.b, compare.Setting(options.model, ids, options.dtype, parse_size(options.ram)), options.all)


def add_trace(commands):
    """python -m k2 trace"""
    sub = commands.add_parser("trace", help="what every layer does to a prompt", description="Show, layer by layer, the stream's size, attention, the chosen experts, and what could be read off there.")
    sub.add_argument("prompt", help="a text; - reads standard input")
    sub.add_argument("--model", default=MINI, type=path_or_name, metavar="DIR", help="a checkpoint directory (default: the shipped K2-mini)")
    sub.add_argument("--token", type=int, metavar="N", help="which token of the prompt, from 0 (default: the last); the page opens with it")
    sub.add_argument("--head", type=int, metavar="H", help="attention of this head (default: the average of all)")
    sub.add_argument("--html", type=path_or_name, metavar="FILE", help="also write one page for a browser, with all tokens to choose from")
    sub.add_argument("--json", type=path_or_name, metavar="FILE", help="also write all numbers as JSON")
    sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    sub.add_argument("--dtype", default="auto", choices=tuple(DTYPES))
    sub.add_argument("--ram", metavar="SIZE", help="memory for the weights; the rest is read from disk when it is asked for")
    sub.set_defaults(run=run_trace, prompt_file=None)


def run_trace(options):
    """The page of one token on stdout, and the files."""
    from . import trace, trace_page

    prompt, tokenizer = read_prompt(options), Tokenizer.from_directory(options.model)
    model = load(options.model, pick_device(options.device), DTYPES[options.dtype], ram=parse_size(options.ram))
    found = trace.trace(model, tokenizer, tokenizer.encode(prompt), options.head, Path(options.model).resolve().name)
    text = trace.text(found, options.token)  # refuses a token that there is not, before a file is written
    if options.json:
        trace.write_json(found, options.json)
    if options.html:
        trace.write(options.html, trace_page.page(found, options.token))
    print(text)


def add_chat(commands):
    """python -m k2 chat"""
    sub = commands.add_parser("chat", help="talk to a model", description="A chat: answers on stdout, all else on stderr. Inside, /help lists the commands.")
    add_model_flags(sub, max_new_tokens=512, temperature=0.6)
    sub.add_argument("--style", default="auto", choices=("auto", "instruct", "thinking"), help="the chat format (default: the checkpoint's own template, or its family's)")
    sub.add_argument("--system", metavar="TEXT", help="the system message")
    sub.add_argument("--tools", type=path_or_name, metavar="FILE.py", help="offer its functions; each call is run after you have said y")
    sub.add_argument("--web-search", action="store_true", help="offer $web_search, answered offline from this repository's lessons and code")
    sub.add_argument("--json", action="store_true", help="every answer is a JSON object")
    sub.add_argument("--schema", type=path_or_name, metavar="FILE", help="every answer is JSON of this JSON Schema")
    sub.add_argument("--load", type=path_or_name, metavar="FILE", help="take up a dialog that /save wrote")
    sub.set_defaults(run=run_chat)


def run_chat(options):
    """Load the model, say what it is, and read lines."""
    from . import terminal

    if options.max_new_tokens < 1:
        raise K2Error(f"--max-new-tokens: found {options.max_new_tokens}; expected 1 or more.")
    Sampler(options.temperature, options.top_p, options.seed)  # refuses what it cannot take, before a model is loaded
    schema = terminal.read_json(options.schema) if options.schema else True if options.json else None
    tokenizer, device = Tokenizer.from_directory(options.model), pick_device(options.device)
    style = terminal.style_of(options.model, tokenizer) if options.style == "auto" else options.style
    model = loaded(options, device)
    chat = terminal.Chat(
        model, tokenizer, style, max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
        seed=options.seed, schema=schema, web_search=options.web_search, ask=terminal.read_line)  # fmt: skip
    for given, take in ((options.load, chat.load), (options.system, chat.system), (options.tools, chat.offer)):
        if given:
            take(given)
    print(f"{options.model} on {device}, {model.config.max_position_embeddings} tokens of context. /help lists the commands.", file=sys.stderr)
    if Path(options.model).resolve() == MINI.resolve():
        print("K2-mini is a base model of Python code that was never taught to chat: expect more code, not answers.", file=sys.stderr)
    chat.run()


def add_train(commands):
    """python -m k2 train"""
    sub = commands.add_parser("train", help="train K2-mini from this machine's Python sources, or a checkpoint further", description="Train a model; resumes if --out holds a state.")
    sub.add_argument("--out", required=True, type=path_or_name, metavar="DIR", help="tokens, state.pt, curve.csv and .png, and at the end checkpoint-FORMAT")
    sub.add_argument("--config", default=MINI, type=path_or_name, metavar="FILE", help="config.json of the model to make (default: K2-mini's)")
    sub.add_argument("--init", type=path_or_name, metavar="DIR", help="a checkpoint to train further, with its own tokenizer, instead of a new model")
    sub.add_argument("--data", nargs="+", default=[], type=path_or_name, metavar="FILE", help="with --init: UTF-8 text to train on (default: K2-mini's corpus); the last 5 %% are held out")
    for name, default in (("steps", "3000; 200 with --init"), ("rows", "16"), ("window", "256"), ("stretch", "4; 1 with --init"), ("seed", "0"), ("save-every", "100")):
        sub.add_argument(f"--{name}", type=int, metavar="N", help=f"default: {default}")
    sub.add_argument("--lr", type=float, help="learning rate of all parameters (default: 0.01; 0.002 with --init)")
    sub.add_argument("--decay-share", type=float, default=0.35, metavar="X", help="part of the run over which the learning rate falls to 0")
    sub.add_argument("--minutes", type=float, metavar="M", help="as many steps as fit, instead of --steps")
    sub.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    sub.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="weights stay float32 in the optimizer (default: bfloat16 on a GPU, float32 on a CPU)")
    sub.set_defaults(run=run_train)


def run_train(options):
    """Text, tokens, run, checkpoints."""
    from .training import pretraining, recipe

    defaults = {"steps": 200 if options.init else 3000, "stretch": 1 if options.init else 4, "lr": 2e-3 if options.init else 1e-2}
    given = {name: getattr(options, name) for name in ("steps", "rows", "window", "stretch", "seed", "save_every", "lr", "decay_share")}
    settings = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    for name in ("steps", "rows", "window", "stretch", "save_every", "lr"):
        if not settings.get(name, 1) > 0:
            raise K2Error(f"--{name.replace('_', '-')}: found {settings[name]}; expected a positive number.")
    if options.minutes is not None and not options.minutes > 0:
        raise K2Error(f"--minutes: found {options.minutes:g}; expected a positive number.")
    if options.data and not options.init:
        raise K2Error("--data: found without --init; expected a checkpoint to train further, such as --init k2/mini.")
    run, device, out = pretraining.Run(adamw_lr=settings["lr"], **settings), pick_device(options.device), Path(options.out)
    dtype = recipe.training_dtype(options.dtype, device)
    if options.init:
        recipe.continue_checkpoint(Path(options.init), [Path(name) for name in options.data], out, run, dtype, device, options.minutes)
    else:
        recipe.make_checkpoint(K2Config.from_json(options.config), out, run, dtype, device, options.minutes)
    made = next(iter(sorted(out.glob("checkpoint-*"), reverse=True)))
    print(f"done; {out / 'curve.png'} shows the run; try: python -m k2 evaluate --model {made}", file=sys.stderr)


def add_experiment(commands):
    """python -m k2 experiment"""
    sub = commands.add_parser("experiment", help="K2's training claims in small", description="Run one experiment (minutes); a table on stdout, NAME.json and NAME.png in --out.")
    sub.add_argument("name", metavar="NAME", help="clip, optimizer, newton-schulz, sparsity, balance or rephrasing")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    sub.add_argument("--steps", type=int, metavar="N", help="a shorter or longer run")
    sub.add_argument("--out", default="runs/experiments", type=path_or_name, metavar="DIR")
    sub.add_argument("--redraw", action="store_true", help="table and figure from --out/NAME.json, without running")
    sub.set_defaults(run=run_experiment)


def run_experiment(options):
    """The table, and the files."""
    from .training import experiments

    if options.steps is not None and options.steps < 2:
        raise K2Error(f"--steps: found {options.steps}; expected 2 or more.")
    command = f"python -m k2 experiment {options.name} --seeds {' '.join(map(str, options.seeds))}" + (f" --steps {options.steps}" if options.steps else "")
    folder = Path(options.out)
    result = experiments.read(options.name, folder) if options.redraw else experiments.experiment(options.name, options.seeds, options.steps, command)
    print(experiments.table_text(result))
    experiments.write(result, folder)


def add_evaluate(commands):
    """python -m k2 evaluate"""
    sub = commands.add_parser("evaluate", help="bits per byte on held-out modules", description="Measure a model on modules of the standard library that K2-mini's training never saw.")
    sub.add_argument("--model", default=MINI, type=path_or_name, metavar="DIR")
    sub.add_argument("--dtype", default="auto", choices=tuple(DTYPES))
    sub.add_argument("--data", nargs="+", default=[], type=path_or_name, metavar="PATH", help="measure on these files (of a folder, its .py files) instead of the held-out modules")
    sub.add_argument("--compare", action="store_true", help="also what xz needs, alone and behind the training text, and an n-gram model (minutes)")
    sub.add_argument("--needle", action="store_true", help="also whether it finds a line again, by length and depth (minutes)")
    sub.set_defaults(run=run_evaluate)


def run_evaluate(options):
    """The model card's figures, on stdout."""
    from .training import evaluation

    text, tokenizer = text_to_measure(options.data), Tokenizer.from_directory(options.model)
    model, ids, size = load(options.model, dtype=DTYPES[options.dtype]), tokenizer.encode(text), len(text.encode())
    print(f"{'given' if options.data else 'held-out'} text: {size} bytes, {len(ids)} tokens, {size / len(ids):.2f} bytes a token")
    print(f"model: {evaluation.bits_per_byte(model, ids, size):.4f} bits per byte")
    for i, (idlest, busiest) in enumerate(evaluation.expert_shares(model, ids[:65536])):
        print(f"layer {model.config.first_k_dense_replace + i}: idlest expert {idlest:.2f}, busiest {busiest:.2f} times the mean load")
    if options.compare:
        print_comparison(text, ids, tokenizer)
    if options.needle:
        for length in (128, 256, 512, 1024):
            found = [evaluation.needle_accuracy(model, tokenizer, length, depth) for depth in (0.0, 0.5, 0.9)]
            print(f"needle in {length} tokens, of 8 words: {found[0]:.2f} at depth 0, {found[1]:.2f} at 0.5, {found[2]:.2f} at 0.9")


def text_to_measure(paths: list[str]) -> str:
    """The given files' text, or that of the held-out modules."""
    from .training import corpus, evaluation

    files = [f for path in map(Path, paths) for f in (corpus.sources(path) if path.is_dir() else [path])]
    text = "".join(corpus.read_texts(files)) if paths else evaluation.held_out_text()
    if not text:
        raise K2Error(f"--data {' '.join(paths)}: expected UTF-8 text, found none. Check the names.")
    return text


def print_comparison(text: str, ids: list[int], tokenizer: Tokenizer):
    """The same text through xz and through an n-gram model of the training tokens."""
    from .training import corpus, evaluation

    size, before = len(text.encode()), evaluation.training_text()
    print(f"lines of 30 characters or more that training saw too: {evaluation.seen_share(text, before):.1%} of their bytes")
    print(f"xz -9e: {evaluation.xz_bits_per_byte(text):.4f} bits per byte")
    print(f"xz -9e behind the training text: {evaluation.xz_bits_per_byte(text, before):.4f} bits per byte")
    stream = corpus.token_stream(tokenizer, [(path, 1) for path, _ in corpus.training_files()])
    print(f"5-gram model of the training tokens: {evaluation.ngram_bits_per_byte(stream, ids, size, tokenizer.vocab_size):.4f} bits per byte")


def add_bench(commands):
    """python -m k2 bench"""
    sub = commands.add_parser("bench", help="speed, and what the machine could move", description="Measure a checkpoint at one or more memory budgets beside this machine's ceilings; without DIR, K2-mini and a mid-size model beside transformers.")
    sub.add_argument("directory", nargs="?", type=path_or_name, metavar="DIR", help="a checkpoint")
    sub.add_argument("--ram", nargs="+", default=[None], metavar="SIZE", help="memory for the weights, one row of the table each (default: what is free)")
    sub.add_argument("--gpu-memory", metavar="SIZE")
    sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sub.add_argument("--dtype", default="auto", choices=tuple(DTYPES))
    sub.add_argument("--compile", action="store_true", help="torch.compile for decode, and for the FP8 experts of prompts")
    sub.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (default: 512)")
    sub.add_argument("--new", type=int, default=32, metavar="N", help="tokens decoded (default: 32)")
    sub.add_argument("--rounds", type=int, default=3, metavar="N")
    sub.add_argument("--json", action="store_true", help="all figures as JSON instead of a table")
    sub.add_argument("--profile", action="store_true", help="where the time of a decoded token goes instead, by operation; what it saw of each token stays in memory until the end, so where that is short give a small --new")
    sub.add_argument("--beside", action="store_true", help="DIR in turn with transformers instead")
    sub.add_argument("--train", action="store_true", help="training steps instead: this optimizer beside transformers with AdamW")
    sub.add_argument("--write", metavar="PRESET", help="write a checkpoint of random weights to DIR: mid, big, or slice, which has K2's own widths")
    sub.add_argument("--format", default="fp8", choices=("bf16", "fp8", "int4"), help="with --write")
    sub.add_argument("--layers", type=int, metavar="N", help="with --write: so many layers")
    sub.add_argument("--context", type=int, nargs="+", metavar="N", help="what a token costs behind so many others instead, such as 1024 8192 32768 131072")
    sub.add_argument("--replay", action="store_true", help="hit rates of K2-mini's own routing by policy, and how right guesses are, instead")
    sub.add_argument("--mask", action="store_true", help="what JSON Mode costs a step with a vocabulary of K2's size instead")
    sub.add_argument("--products", action="store_true", help="how fast one token's products read an expert of K2's own widths in each format, instead; with --compile the compiled forms too")
    sub.add_argument("--rows", type=int, default=1, metavar="N", help="with --products: so many tokens at a time (default: 1)")
    sub.add_argument("--child", nargs=4, metavar=("ENGINE", "DIR", "PROMPT", "NEW"), help="what each process of a comparison runs")
    sub.add_argument("--alone", metavar="JSON", help="what each process of a table runs")
    sub.set_defaults(run=run_bench)


def check_bench(options):
    """Refuse what cannot be measured, before any work."""
    for name in ("rounds", "prompt", "new", "rows"):
        if getattr(options, name) < 1:
            raise K2Error(f"--{name}: found {getattr(options, name)}; expected 1 or more.")
    if options.rows != 1 and not options.products:
        raise K2Error("--rows: goes with --products; found it without. Add --products, or leave it out.")
    if options.layers is not None and options.layers < 1 or options.context and min(options.context) < 0:
        raise K2Error(f"--layers, --context: found {options.layers}, {options.context}; expected layers from 1 and lengths from 0.")
    if options.profile and (options.directory is None or len(options.ram) > 1):
        raise K2Error(f"bench --profile: found {options.directory or 'no checkpoint'}, --ram {' '.join(map(str, options.ram)) if options.ram[0] else 'not given'}; expected one checkpoint and one size at most. Name the folder, and one budget.")
    if options.profile and options.device != "cpu":
        raise K2Error(f"bench --profile: found --device {options.device}; expected cpu, since it watches when the CPU asks for an operation, and a GPU works behind its back. Leave --device out.")


def run_bench(options):
    """The table, the comparison, or one measurement of either."""
    from . import bench, beside, mask_bench, product_bench, synthetic
    from .training import speed

    check_bench(options)
    if options.child:
        engine, directory, *counts = options.child
        if engine in speed.ENGINES:
            speed.child(engine, directory, *map(int, counts), DTYPES[options.dtype])
        else:
            print(json.dumps(beside.child(engine, directory, *map(int, counts), DTYPES[options.dtype])))
    elif options.mask:
        mask_bench.bench()
    elif options.products and options.directory:
        raise K2Error(f"bench --products: found {options.directory}; expected no checkpoint, since it makes its own weights. Leave it out.")
    elif options.products:
        product_bench.bench(K2Config.from_json(MINI.parent / "configs" / "kimi-k2-instruct.json"), options.rounds, options.compile, options.rows)
    elif options.replay:
        print_replay()
    elif options.train:
        speed.compare(MINI, options.rounds)
    elif options.directory is None:
        beside.bench(MINI, rounds=options.rounds)
    elif options.write:
        instruct = K2Config.from_json(MINI.parent / "configs" / "kimi-k2-instruct.json")
        synthetic.write(synthetic.preset(options.write, instruct, options.layers), options.format, options.directory)
    elif options.alone:
        print(json.dumps(bench.alone(options.directory, json.loads(options.alone))))
    elif options.context:
        print(bench.context_table(bench.long_context(options.directory, options.context, options.dtype)))
    elif options.beside:
        beside.compare_checkpoint(Path(options.directory), options.prompt, options.new, options.rounds, options.compile, options.dtype)
    else:
        print_budgets(options)


def print_replay():
    """K2-mini's routing on code that it never saw and on these lessons' prose."""
    from . import routes
    from .training import evaluation

    model, tokenizer = load(MINI), Tokenizer.from_directory(MINI)
    prose = "".join(path.read_text(encoding="utf-8") for path in sorted((MINI.parent.parent / "lessons").glob("[0-9]*.md")))
    texts = {"code": evaluation.held_out_text(), "prose": prose}
    print(routes.table({name: routes.record(model, tokenizer.encode(text)[:8192]) for name, text in texts.items()}))


def print_budgets(options):
    """The table, or all its figures."""
    from . import bench

    if not Path(options.directory).is_dir():
        raise K2Error(f"{options.directory}: expected a checkpoint directory, found {'a file' if os.path.exists(options.directory) else 'nothing'}. Give the folder that holds config.json.")
    settings = {name: getattr(options, name) for name in ("device", "dtype", "prompt", "new")}
    settings |= {"gpu_memory": parse_size(options.gpu_memory), "compiled": options.compile}
    if options.profile:
        found = bench.profile(options.directory, settings | {"ram": parse_size(options.ram[0])})
        print(json.dumps(found) if options.json else bench.profile_table(found))
        return
    result = bench.bench(options.directory, [parse_size(size) for size in options.ram], settings, options.rounds)
    print(json.dumps(result) if options.json else bench.table(result))


if __name__ == "__main__":
    sys.exit(main())
