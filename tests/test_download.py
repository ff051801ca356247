"""download_weights.py against a local hub: whole, in part, and through every fault that has a name.

After each run, whatever happened: nothing stands under a final name that is not the hub's own bytes.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import local_hub
import pytest
import safetensors.torch
import torch
from local_hub import COMMIT, REPO, LocalHub
from small import assert_same, random_model, small_config

import k2
import download_weights
from k2 import download
from k2.__main__ import main as k2_main
from k2.checkpoint import INDEX
from k2.download import RECORD
from k2.hub import Hub, Patience
from k2.tokenizer import tokenizer_files, train_ranks

ROOT = Path(__file__).resolve().parent.parent
FIRST, SECOND, LAST = (f"model-{i}-of-3.safetensors" for i in (1, 2, 3))
QUICK = Patience(tries=4, first=0.001, timeout=1.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small K2 in FP8, three shards, with a tokenizer: 1.2 MB."""
    ranks = train_ranks(["def read(path):\n    return open(path).read()\n" * 4], 300)
    model = random_model(small_config(vocab_size=len(ranks) + 256, hidden_size=256, moe_intermediate_size=40, max_position_embeddings=64))
    directory = tmp_path_factory.mktemp("source") / "k2"
    k2.save(model, directory, format="fp8", shards=3, files=tokenizer_files(ranks))
    return directory


@pytest.fixture
def hub(source):
    """The local hub with that checkpoint."""
    server = LocalHub(source)
    yield server
    server.close()


@pytest.fixture
def fetch(hub, tmp_path, monkeypatch, capfd):
    """The command in this process: fetch(*flags) -> (status, stderr); and after it nothing wrong stands there."""
    monkeypatch.setattr(download_weights, "Hub", lambda: Hub(hub.endpoint, patience=QUICK))

    def run(*flags: str, folder=tmp_path / "w"):
        status = download_weights.main([REPO, "--local-dir", str(folder), *flags])
        out, err = capfd.readouterr()
        assert "Traceback" not in err and sum(line.startswith("error: ") for line in err.splitlines()) == (status == 2), err
        own_index = (folder / RECORD).exists() and '"part": {' in (folder / RECORD).read_text()
        for path in folder.glob("*"):
            if path.name in os.listdir(hub.folder) and not (path.name == INDEX and own_index):
                assert path.read_bytes() == (hub.folder / path.name).read_bytes(), f"{path.name} is wrong"
        return status, err

    return run


def same_folders(found: Path, expected: Path):
    ours = {RECORD, ".k2-download.lock"}
    assert {path.name for path in found.iterdir()} - ours == {path.name for path in expected.iterdir()}
    for path in expected.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# ---- the whole ----


def test_a_whole_download_is_the_repository_byte_for_byte_and_loads(fetch, source, tmp_path, hub):
    status, err = fetch()
    assert status == 0, err
    same_folders(tmp_path / "w", source)
    record = json.loads((tmp_path / "w" / RECORD).read_text())
    assert record["commit"] == COMMIT and record["repository"] == REPO and record["part"] is None
    assert set(record["files"]) == {path.name for path in source.iterdir()}
    assert f"{REPO} at {COMMIT}" in err and f"{size_of(source):,} bytes, into {tmp_path / 'w'}" in err
    assert k2.load(tmp_path / "w").config == k2.load(source).config
    assert hub.sent == size_of(source), "every byte crossed the network once"


def test_a_second_run_moves_nothing(fetch, hub):
    assert fetch()[0] == 0
    before = hub.sent
    status, err = fetch()
    assert status == 0 and hub.sent == before and "0 files, 0 bytes are missing" in err


def test_what_was_fetched_by_another_program_is_taken_after_it_was_hashed(fetch, source, tmp_path, hub):
    shutil.copytree(source, tmp_path / "w")
    assert fetch()[0] == 0 and hub.sent == 0
    assert set(json.loads((tmp_path / "w" / RECORD).read_text())["files"]) == {path.name for path in source.iterdir()}


def test_a_strangers_file_of_the_same_name_is_refused_and_left_alone(fetch, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text("mine")
    assert download_weights.main([REPO, "--local-dir", str(tmp_path / "w")]) == 2
    assert (tmp_path / "w" / "config.json").read_text() == "mine" and not list((tmp_path / "w").glob("*.part"))


def test_a_dry_run_fetches_nothing_and_lists_everything(fetch, source, tmp_path, hub, monkeypatch, capfd):
    assert download_weights.main([REPO, "--local-dir", str(tmp_path / "w"), "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert hub.sent == 0 and not (tmp_path / "w").exists()
    assert {line.split()[1]: int(line.split()[0].replace(",", "")) for line in out.splitlines()} == {path.name: path.stat().st_size for path in source.iterdir()}


def test_code_pickles_folders_and_our_own_names_are_left_out_and_named(fetch, hub, tmp_path):
    for name in ("modeling_deepseek.py", "pytorch_model.bin", "figures/a.json", RECORD, "x.part.json", "../../etc/x.json", "/etc/y.json", "a\nb.json", ".hidden.json"):
        hub.extra.append({"type": "file", "path": name, "size": 5, "oid": "e" * 40})
    status, err = fetch()
    assert status == 0 and "modeling_deepseek.py" in err and "nothing here runs code from a repository" in err
    assert not any((tmp_path / "w" / name).exists() for name in ("modeling_deepseek.py", "pytorch_model.bin", "x.part.json", ".hidden.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w"]


def test_the_revision_is_asked_for_and_its_commit_recorded(fetch, hub, tmp_path):
    hub.revisions.add("v1")
    assert fetch("--revision", "v1")[0] == 0
    assert any(path.endswith("/revision/v1") for _, path, *_ in hub.requests)
    assert all(f"/resolve/{COMMIT}/" in path for _, path, *_ in hub.requests if "/resolve/" in path)
    status, err = fetch("--revision", "v2", folder=tmp_path / "other")
    assert status == 2 and "expected a revision v2, found none" in err


def test_only_what_changed_is_fetched_at_another_commit(fetch, hub, source, tmp_path):
    assert fetch()[0] == 0
    hub.folder = tmp_path / "new"
    shutil.copytree(source, hub.folder)
    (hub.folder / "generation_config.json").write_text("{}")
    hub.digests.clear()
    hub.commit, before = "9" * 40, hub.sent
    assert fetch()[0] == 0 and hub.sent == before + 2
    assert json.loads((tmp_path / "w" / RECORD).read_text())["commit"] == "9" * 40


# ---- faults, each with a name ----

PASSING = {  # what is waited out: the file ends up right, in the same run
    "a cut connection": [local_hub.cut(0.5)],
    "a connection cut before the first byte": [local_hub.cut(0.0)],
    "three cuts in a row": [local_hub.cut(0.3)] * 3,
    "a short read": [local_hub.short(0.5)],
    "an answer shorter than asked for": [local_hub.brief],
    "a stall": [local_hub.stall(0.4)],
    "429 with a wait": [local_hub.status(429, Retry_After="0")] * 2,
    "429 without one": [local_hub.status(429)],
    "503 with a date": [local_hub.status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")],
    "500, 502, 504": [local_hub.status(500), local_hub.status(502), local_hub.status(504)],
    "Range ignored from the start": [local_hub.whole],
    "Range ignored after a cut": [local_hub.cut(0.5), local_hub.whole],
    "a page in place of data": [local_hub.page],
    "another range": [local_hub.other_range],
    "one bit flipped on the way": [local_hub.flip(1000)],
    "all bytes shifted by one": [local_hub.shifted],
    "all bytes shifted after a cut": [local_hub.cut(0.5), local_hub.shifted],
    "no HTTP": [local_hub.garbage],
    "416 once": [local_hub.status(416)],
    "a redirect in a circle, once": [local_hub.away("/cdn/" + LAST)],
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_waited_out(fetch, hub, source, tmp_path, fault):
    hub.faults[LAST] = list(PASSING[fault])
    status, err = fetch()
    assert status == 0 and not hub.faults[LAST], err
    same_folders(tmp_path / "w", source)


@pytest.mark.parametrize("fault, most", [("a short read", 1.0), ("a stall", 1.0), ("a cut connection", 1.2)])
def test_a_break_costs_no_byte_twice(fetch, hub, source, fault, most):
    hub.faults[LAST] = list(PASSING[fault])
    assert fetch()[0] == 0 and hub.sent <= most * size_of(source), "of a broken connection the system throws away what lay unread"


LASTING = {  # what no waiting changes: one line that says so, and what has arrived stays
    "404": ([local_hub.status(404)], ["404", "Check the name"]),
    "401": ([local_hub.status(401)], ["401", "gated", "HF_TOKEN"]),
    "403": ([local_hub.status(403)], ["403", "gated", "HF_TOKEN"]),
    "503 without end": ([local_hub.status(503)] * 9, ["4 failures in a row", "503", "run the same command again"]),
    "cut without end": ([local_hub.cut(0.0)] * 9, ["4 failures in a row", "run the same command again"]),
    "flipped three times": ([local_hub.flip(1000)] * 3, ["expected sha256:", "three times over", "nothing of it was kept"]),
    "416 without end": ([local_hub.status(416)] * 9, ["three times over", "416"]),
    "a redirect to a file": ([local_hub.away("file:///etc/passwd")], ["redirected to 'file:///etc/passwd'", "HF_ENDPOINT"]),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_stays_is_one_line_and_the_next_run_finishes(fetch, hub, source, tmp_path, fault):
    faults, words = LASTING[fault]
    hub.faults[LAST] = list(faults)
    status, err = fetch()
    assert status == 2 and all(word in err.splitlines()[-1] for word in [LAST, *words]) or fault.startswith("a redirect") and "redirected" in err, err
    assert not (tmp_path / "w" / LAST).exists()
    hub.faults.clear()
    assert fetch()[0] == 0
    same_folders(tmp_path / "w", source)


@pytest.mark.parametrize("path", [f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}/tree/{COMMIT}", f"/{REPO}/resolve/{COMMIT}/{LAST}"])
def test_the_hubs_own_answers_are_waited_for_too(fetch, hub, source, tmp_path, path):
    hub.faults[path] = [local_hub.status(503, Retry_After="0")]
    assert fetch()[0] == 0 and not hub.faults[path]
    same_folders(tmp_path / "w", source)


def test_a_gated_repository_says_what_to_do_and_a_token_opens_it(fetch, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.token = "hf_secret"
    status, err = fetch()
    assert status == 2 and f"Accept its terms at {hub.endpoint}/{REPO}" in err and "HF_TOKEN" in err
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch()[0] == 0
    assert {authorization for _, path, _, authorization in hub.requests if "/api/" in path} == {None, "Bearer hf_secret"}


def test_the_token_is_not_sent_to_another_host(source, hub, tmp_path):
    other = LocalHub(source)
    try:
        hub.token = "hf_secret"
        hub.faults[f"/{REPO}/resolve/{COMMIT}/{LAST}"] = [lambda answer, *rest: answer.resolve(LAST), local_hub.away(f"{other.endpoint}/cdn/{LAST}")]
        client = Hub(hub.endpoint, "hf_secret", QUICK)
        repository = client.repository(REPO)
        client.etag(repository, repository.files[LAST])
        size = repository.files[LAST].size
        raw = b"".join(client.stream(LAST, client.url(repository, LAST), 0, size, repository.files[LAST]))
        assert raw == (source / LAST).read_bytes() and [request[3] for request in other.requests] == [None]
    finally:
        other.close()


def test_a_list_of_files_that_goes_on_at_another_host_is_refused_and_that_host_sees_no_token(source, hub):
    other = LocalHub(source)
    try:
        hub.token = "hf_secret"
        link = {"Link": f'<{other.endpoint}/api/models/{REPO}/tree/{COMMIT}>; rel="next"'}
        hub.faults[f"/api/models/{REPO}/tree/{COMMIT}"] = [lambda answer, *rest: answer.plain(200, b"[]", link)]
        with pytest.raises(k2.K2Error, match="the list of files goes on at .*; expected a page of"):
            Hub(hub.endpoint, "hf_secret", QUICK).repository(REPO)
        assert other.requests == []
    finally:
        other.close()


def test_a_repository_that_is_not_there_and_a_name_that_is_none(fetch, hub, monkeypatch, capfd, tmp_path):
    for name, words in (("made/other", "404"), ("a b/c", "expected the name of a repository"), ("", "expected a repository")):
        assert download_weights.main([name, "--local-dir", str(tmp_path / "x")]) == 2
        assert words in capfd.readouterr().err
    assert download_weights.main(["mini"]) == 2 and "K2-mini is shipped" in capfd.readouterr().err


def test_no_network_is_one_line(tmp_path, monkeypatch, capfd, source):
    server = LocalHub(source)
    server.close()
    monkeypatch.setattr(download_weights, "Hub", lambda: Hub(server.endpoint, patience=QUICK))
    assert download_weights.main([REPO, "--local-dir", str(tmp_path / "w")]) == 2
    err = capfd.readouterr().err
    assert "Check the network and HF_ENDPOINT" in err and len(err.splitlines()) == 1


def test_offline_mode_is_obeyed(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download_weights.main([REPO, "--local-dir", str(tmp_path / "w")]) == 2
    assert "HF_HUB_OFFLINE is set" in capfd.readouterr().err


def test_a_part_of_another_version_is_not_gone_on_with(fetch, hub, source, tmp_path):
    hub.faults[LAST] = [local_hub.short(0.5), local_hub.status(404)]
    assert fetch()[0] == 2 and (tmp_path / "w" / f"{LAST}.part").stat().st_size > 1000
    hub.folder = tmp_path / "new"
    shutil.copytree(source, hub.folder)
    raw = bytearray((source / LAST).read_bytes())
    raw[-1] ^= 1
    (hub.folder / LAST).write_bytes(raw)
    hub.digests.clear()
    assert fetch()[0] == 0 and (tmp_path / "w" / LAST).read_bytes() == raw


def test_a_file_that_changes_between_two_halves_starts_again(fetch, hub, source, tmp_path):
    raw = bytearray((source / LAST).read_bytes())
    raw[-1] ^= 1

    def change_and_cut(answer, *rest):
        local_hub.cut(0.5)(answer, *rest)
        hub.folder = tmp_path / "new"
        shutil.copytree(source, hub.folder)
        (hub.folder / LAST).write_bytes(raw)
        hub.digests.clear()

    hub.faults[LAST] = [change_and_cut]
    assert fetch("--max-workers", "1")[0] == 2 and not (tmp_path / "w" / LAST).exists(), "its hash is not the one the hub gave first"
    assert fetch()[0] == 0 and (tmp_path / "w" / LAST).read_bytes() == raw


# ---- damage that is found later ----


def test_verify_finds_a_flipped_byte_and_the_next_run_fetches_only_that_shard(fetch, hub, source, tmp_path, capfd):
    assert fetch()[0] == 0
    path = tmp_path / "w" / SECOND
    raw, times = bytearray(path.read_bytes()), path.stat()
    raw[5000] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk's own rot leaves it
    verify = ["--verify", "--local-dir", str(tmp_path / "w")]
    assert download_weights.main(verify) == 2
    out, err = capfd.readouterr()
    assert out.startswith(f"{SECOND}: expected sha256:") and "1 files are missing or not as they were fetched" in err
    before = hub.sent
    assert fetch()[0] == 0 and hub.sent - before == len(raw)
    same_folders(tmp_path / "w", source)
    assert download_weights.main(verify) == 0


@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_verify_needs_no_network_and_finds_other_damage(fetch, hub, source, tmp_path, capfd, monkeypatch, damage):
    assert fetch()[0] == 0
    path = tmp_path / "w" / FIRST
    {"cut": lambda: os.truncate(path, 100), "gone": path.unlink, "longer": lambda: path.write_bytes(path.read_bytes() + b"x")}[damage]()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path / "w")]) == 2
    assert FIRST in capfd.readouterr().out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert fetch()[0] == 0
    same_folders(tmp_path / "w", source)


def test_an_interrupted_repair_leaves_no_damaged_file_to_load(fetch, hub, source, tmp_path, capfd):
    assert fetch()[0] == 0
    (tmp_path / "w" / SECOND).write_bytes(b"x" * (source / SECOND).stat().st_size)
    hub.faults[SECOND] = [local_hub.short(0.5), local_hub.status(403)]
    assert fetch()[0] == 2 and not (tmp_path / "w" / SECOND).exists()
    before = hub.sent
    assert fetch()[0] == 0 and hub.sent - before < 0.6 * (source / SECOND).stat().st_size
    same_folders(tmp_path / "w", source)


@pytest.mark.parametrize("text", ["{", "[]", '{"part": null}', '{"repository": "a/b", "commit": "c", "part": null, "files": {"../x.json": {"size": 1, "digest": "", "mtime_ns": 1, "source": ""}}}'])
def test_a_record_that_nobody_wrote_is_refused(fetch, tmp_path, text):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / RECORD).write_text(text)
    status, err = fetch()
    assert status == 2 and RECORD in err


def test_verify_without_a_record_or_a_folder_is_one_line(tmp_path, capfd):
    for folder, words in ((tmp_path, "expected the record that a download leaves"), (tmp_path / "nowhere", "expected a folder to verify")):
        assert download_weights.main(["--verify", "--local-dir", str(folder)]) == 2
        assert words in capfd.readouterr().err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("note", ["", "{", "[1]", '{"etag": "other"}', None])
def test_a_half_done_file_without_a_right_note_starts_again(fetch, hub, source, tmp_path, note):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / f"{LAST}.part").write_bytes(b"x" * 5000)
    if note is not None:
        (tmp_path / "w" / f"{LAST}.part.json").write_text(note)
    assert fetch()[0] == 0
    same_folders(tmp_path / "w", source)


def test_verify_names_what_never_arrived_and_its_command_finishes(fetch, hub, source, tmp_path, capfd):
    hub.faults[LAST] = [local_hub.short(0.5), local_hub.status(403)]
    assert fetch("--max-workers", "1")[0] == 2
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path / "w")]) == 2
    out, err = capfd.readouterr()
    assert f"{LAST}: missing; " in out and f"are in {LAST}.part" in out
    line = err.strip().rsplit(": python download_weights.py ", 1)[1].split()
    assert line == [REPO, "--local-dir", str(tmp_path / "w"), "--revision", COMMIT]
    assert download_weights.main(line) == 0 and download_weights.main(["--verify", *line[1:3]]) == 0
    same_folders(tmp_path / "w", source)


def test_verify_without_a_single_shard_is_not_whole(fetch, hub, tmp_path, capfd):
    hub.faults = {name: [local_hub.ranged, local_hub.ranged, local_hub.status(404)] for name in (FIRST, SECOND, LAST)}
    assert fetch("--layers", "1-2")[0] == 2
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path / "w")]) == 2
    out, err = capfd.readouterr()
    assert f"part-{LAST}: missing" in out and f"{INDEX}: missing" in out and "--layers 1-2" in err


def test_verify_looks_where_the_download_put_it(fetch, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert download_weights.main([REPO, "--part", "tokenizer"]) == 0 and download_weights.main([REPO, "--verify"]) == 0
    assert "weights/k2: every file is as it was fetched" in capfd.readouterr().err


def test_an_intact_file_of_another_commit_stays_until_the_new_one_is_whole(fetch, hub, source, tmp_path, capfd):
    assert fetch()[0] == 0
    hub.folder = tmp_path / "new"
    shutil.copytree(source, hub.folder)
    raw = bytearray((source / LAST).read_bytes())
    raw[-1] ^= 1
    (hub.folder / LAST).write_bytes(raw)
    hub.digests.clear()
    hub.faults[LAST] = [local_hub.status(404)]
    assert download_weights.main([REPO, "--local-dir", str(tmp_path / "w")]) == 2
    assert (tmp_path / "w" / LAST).read_bytes() == (source / LAST).read_bytes()
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path / "w")]) == 2 and f"{LAST}: of another commit" in capfd.readouterr().out
    assert fetch()[0] == 0 and (tmp_path / "w" / LAST).read_bytes() == raw


def test_our_own_names_that_are_symlinks_are_not_followed(fetch, hub, source, tmp_path):
    folder, precious = tmp_path / "w", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("{}")
    for name in (f".{RECORD}.new", f"{LAST}.part", f"{LAST}.part.json", f".{LAST}.part.json.new", f"{FIRST}.part.json", f"{INDEX}.part"):
        (folder / name).symlink_to(precious)
    assert fetch()[0] == 0 and precious.read_text() == "{}"
    assert (folder / LAST).read_bytes() == (source / LAST).read_bytes() and not (folder / LAST).is_symlink()
    (folder / ".k2-download.lock").unlink()
    (folder / ".k2-download.lock").symlink_to(tmp_path / "made")
    assert fetch()[0] == 2 and not (tmp_path / "made").exists()


def test_a_bit_that_flips_in_half_a_part_is_found_when_it_goes_on(fetch, hub, source, tmp_path):
    hub.faults[LAST] = [local_hub.ranged, local_hub.ranged, local_hub.short(0.9), local_hub.status(403)]
    assert fetch("--layers", "2", "--max-workers", "1")[0] == 2
    half = tmp_path / "w" / f"part-{LAST}.part"
    raw = bytearray(half.read_bytes())
    assert len(raw) > 10_000
    raw[-100] ^= 1
    half.write_bytes(raw)
    assert fetch("--layers", "2")[0] == 0
    same_tensors(stored(tmp_path / "w"), {name: t for name, t in stored(source).items() if k2_part(["--layers", "2"]).takes(name)})


GOOD = {"size": 1, "digest": "sha256:" + "a" * 64, "mtime_ns": 1, "source": ""}


@pytest.mark.parametrize("change", [{"files": []}, {"files": {"a.json": GOOD | {"digest": 5}}}, {"files": {"a.json": GOOD | {"digest": None}}}, {"files": {"a.json": GOOD | {"size": "9"}}}, {"planned": []},
                                    {"planned": {"a.json": 5}}, {"planned": {"../a.json": ""}}, {"repository": 5}, {"part": {"layers": ["a", "b"], "experts": None, "kinds": None}},
                                    {"part": {"layers": None, "experts": {"1": ["x"]}, "kinds": None}}, {"part": {"layers": None, "experts": None, "kinds": [5]}}])  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path, capfd, change):
    raw = {"repository": REPO, "commit": COMMIT, "part": None, "planned": {}, "files": {}}
    (tmp_path / RECORD).write_text(json.dumps(raw))
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path)]) == 0
    (tmp_path / RECORD).write_text(json.dumps(raw | change))
    capfd.readouterr()
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path)]) == 2
    err = capfd.readouterr().err
    assert RECORD in err and len(err.splitlines()) == 1


def test_flags_that_cannot_be_are_one_line(fetch, capfd):
    for flags, words in ((["--experts", "9" * 5000 + ":1"], "expected a layer, a colon"), (["--local-dir", "a\0b"], "found a zero byte")):
        assert download_weights.main([REPO, *flags]) == 2
        err = capfd.readouterr().err
        assert words in err and len(err.splitlines()) == 1 and len(err) < 400


def test_names_that_steer_a_terminal_are_printed_escaped(fetch, hub):
    hub.extra.append({"type": "file", "path": "\x1b[2Ja\n.json", "size": 5, "oid": "e" * 40})
    status, err = fetch("--part", "tokenizer")
    assert status == 0 and "\x1b" not in err and "\\x1b[2Ja\\n.json" in err


def test_a_plan_counts_what_was_read_to_make_it(fetch, hub):
    _, err = fetch("--layers", "1", "--dry-run")
    assert f"{hub.sent:,} bytes were read to find them" in err


# ---- room, and company ----


def test_a_disk_without_room_is_refused_before_anything_is_fetched(fetch, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**6}))
    status, err = fetch()
    assert status == 2 and "1,000,000 bytes are free; expected" in err and "--layers, --experts or --part" in err and hub.sent == 0


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails like one on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
import download_weights
sys.exit(download_weights.main())
"""


def command(hub, folder: Path, *flags: str, code: str | None = None, **extra) -> tuple[list[str], dict]:
    """The command line and the environment of a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **extra}
    return [sys.executable, *(["-c", code] if code else [str(ROOT / "download_weights.py")]), REPO, "--local-dir", str(folder), *flags], environment


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of another kind")
def test_a_disk_that_fills_up_is_one_line_and_what_arrived_is_kept(fetch, hub, source, tmp_path):
    line, environment = command(hub, tmp_path / "w", code=LIMITED)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "could not be written: File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    kept = sum(path.stat().st_size for path in (tmp_path / "w").glob("*.part"))
    assert 0 < kept and all(path.read_bytes() == (source / path.name).read_bytes() for path in (tmp_path / "w").glob("*.safetensors"))
    before = hub.sent
    assert fetch()[0] == 0
    same_folders(tmp_path / "w", source)
    assert hub.sent - before <= size_of(source) - kept


def test_killed_in_the_middle_and_run_again_costs_no_byte_twice(hub, source, tmp_path):
    hub.faults[LAST] = [local_hub.gate(0.5)]
    line, environment = command(hub, tmp_path / "w")
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE)
    assert hub.arrived.wait(30)
    part, wanted, patience = tmp_path / "w" / f"{LAST}.part", (source / LAST).stat().st_size // 2, time.monotonic() + 10
    while not part.exists() or part.stat().st_size < wanted - 2**16 or len(list((tmp_path / "w").glob("*.safetensors"))) < 2:
        assert time.monotonic() < patience
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -9 and not (tmp_path / "w" / LAST).exists()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    same_folders(tmp_path / "w", source)
    assert hub.sent <= 1.1 * size_of(source)
    assert "every hash is recorded" in done.stderr and "\r" not in done.stderr, "no progress line where nobody looks"


def test_two_downloads_at_once_are_one_download_and_one_line(hub, source, tmp_path):
    hub.faults[FIRST] = [local_hub.gate(0.5)]
    line, environment = command(hub, tmp_path / "w")
    first = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE)
    assert hub.arrived.wait(30)
    second = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2 and "found another download at work. Wait for it" in second.stderr
    hub.opened.set()
    first.communicate(timeout=60)
    assert first.returncode == 0
    same_folders(tmp_path / "w", source)


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(fetch, hub, source, tmp_path):
    hub.faults[LAST] = [local_hub.gate(0.5)]
    line, environment = command(hub, tmp_path / "w", code="import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import download_weights; sys.exit(download_weights.main())")
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    assert hub.arrived.wait(30)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    hub.opened.set()
    _, err = process.communicate(timeout=40)
    assert process.returncode == 130 and "the same command goes on from here" in err and "Traceback" not in err, err
    assert fetch()[0] == 0
    same_folders(tmp_path / "w", source)


def test_the_progress_line_has_rate_and_time_left(monkeypatch):
    clock = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr(download_weights.time, "monotonic", lambda: next(clock))
    progress = download_weights.Progress(3_000_000_000)
    progress.add(1_000_000_000)
    assert progress.line() == "1.00 of 3.00 GB, 33.3%, 100.0 MB/s, 0:00:20 left"


# ---- a part ----


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in Path(folder).glob("*.safetensors") for name, t in safetensors.torch.load_file(path).items()}


def same_tensors(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name in expected:
        assert_same(found[name].view(torch.uint8), expected[name].view(torch.uint8), name)


PARTS = [["--layers", "1"], ["--layers", "0-1"], ["--layers", "1", "--part", "attention"], ["--experts", "1:3,7", "--experts", "2:0"], ["--layers", "2", "--experts", "2:4"],
         ["--part", "router"], ["--part", "embedding", "--part", "head"], ["--layers", "0-2"]]  # fmt: skip


@pytest.mark.parametrize("flags", PARTS, ids=" ".join)
def test_a_part_equals_the_whole_tensor_for_tensor_and_moves_no_other_byte(fetch, hub, source, tmp_path, capfd, flags):
    status, err = fetch(*flags)
    assert status == 0, err
    folder, whole = tmp_path / "w", stored(source)
    part = k2_part(flags)
    same_tensors(stored(folder), {name: t for name, t in whole.items() if part.takes(name)})
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert json.loads((folder / RECORD).read_text())["part"] == json.loads(json.dumps(part.to_dict()))
    k2.Checkpoint(folder, partial=True)
    assert k2_main(["inspect", str(folder)]) == 0
    planned = int(err.split(" bytes, into")[0].rsplit(" ", 1)[1].replace(",", ""))
    read = int(err.split("bytes received")[1].split(" of them to plan")[0].rsplit(" ", 1)[1].replace(",", ""))
    assert hub.sent == planned + read, "the planned bytes, and those to plan, are all that crossed the network"


def k2_part(flags: list[str]):
    given = {name: [flags[i + 1] for i, flag in enumerate(flags) if flag == name] for name in ("--layers", "--experts", "--part")}
    return download_weights.parse_part(next(iter(given["--layers"]), None), given["--experts"], given["--part"])


def test_the_first_layers_run_and_are_the_whole_models(fetch, source, tmp_path, capfd):
    assert fetch("--layers", "0-1")[0] == 0
    ids = torch.tensor([5, 9, 2])
    assert_same(k2.load(tmp_path / "w", layers=2)(ids), k2.load(source, layers=2)(ids), "logits of two layers")


def test_the_tokenizer_alone_is_a_tokenizer(fetch, source, tmp_path):
    assert fetch("--part", "tokenizer")[0] == 0
    assert not list((tmp_path / "w").glob("*.safetensors*"))
    assert k2.Tokenizer.from_directory(tmp_path / "w").encode("def read") == k2.Tokenizer.from_directory(source).encode("def read")


def test_neighbouring_tensors_are_one_request(fetch, hub):
    assert fetch("--layers", "1", "--part", "attention")[0] == 0
    ranges = [text for method, path, text, _ in hub.requests if path == f"/cdn/{SECOND}"]
    assert len(ranges) - 2 <= 4, ranges  # two for the header; 13 tensors lie in four places: by dtype, then by name


@pytest.mark.parametrize("fault", ["a cut connection", "a stall", "429 with a wait", "416 once", "an answer shorter than asked for", "another range", "no HTTP"])
def test_a_part_goes_through_faults_too(fetch, hub, source, tmp_path, fault):
    hub.faults[SECOND] = [local_hub.ranged, local_hub.ranged, *PASSING[fault]]
    assert fetch("--layers", "1")[0] == 0 and not hub.faults[SECOND]
    same_tensors(stored(tmp_path / "w"), {name: t for name, t in stored(source).items() if k2_part(["--layers", "1"]).takes(name)})


def test_a_part_cut_in_the_middle_is_gone_on_with_by_the_next_run(fetch, hub, source, tmp_path):
    hub.faults[SECOND] = [local_hub.ranged, local_hub.ranged, local_hub.short(0.6), local_hub.status(404)]
    assert fetch("--layers", "1")[0] == 2
    before, kept = hub.sent, (tmp_path / "w" / f"part-{SECOND}.part").stat().st_size
    assert kept > 10_000 and fetch("--layers", "1")[0] == 0
    size = sum(t.numel() * t.element_size() for t in stored(tmp_path / "w").values())
    same_tensors(stored(tmp_path / "w"), {name: t for name, t in stored(source).items() if k2_part(["--layers", "1"]).takes(name)})
    headers = hub.sent - before - (size - kept)
    assert headers < size, "only what was missing, the index and the header"


def test_a_server_without_range_cannot_give_a_part(fetch, hub):
    hub.faults[SECOND] = [local_hub.whole]
    status, err = fetch("--layers", "1")
    assert status == 2 and "ignores Range" in err


def test_a_flipped_byte_of_a_part_is_found_by_its_own_hash(fetch, hub, source, tmp_path, capfd):
    assert fetch("--layers", "1-2")[0] == 0
    path = tmp_path / "w" / f"part-{SECOND}"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path / "w")]) == 2
    assert f"part-{SECOND}" in capfd.readouterr().out
    before = len(hub.requests)
    assert fetch("--layers", "1-2")[0] == 0
    bodies = [path for method, path, *_ in hub.requests[before:] if path.startswith("/cdn/") and method == "GET"]
    assert bodies.count(f"/cdn/{LAST}") == 2, "of the other shard only the header, by two ranges"
    same_tensors(stored(tmp_path / "w"), {name: t for name, t in stored(source).items() if k2_part(["--layers", "1-2"]).takes(name)})


def test_a_part_does_not_take_the_place_of_a_whole_checkpoints_index(fetch, hub, source, tmp_path):
    shutil.copytree(source, tmp_path / "w")
    status, err = fetch("--layers", "1")
    assert status == 2 and f"{INDEX}: expected no index, or this part's own" in err and "Choose another --local-dir" in err
    same_folders(tmp_path / "w", source)
    assert not (tmp_path / "w" / RECORD).exists()


def test_a_part_whose_index_is_there_without_a_record_is_taken(fetch, hub, tmp_path):
    assert fetch("--layers", "1")[0] == 0
    record = json.loads((tmp_path / "w" / RECORD).read_text())
    del record["files"][INDEX]
    (tmp_path / "w" / RECORD).write_text(json.dumps(record))
    assert fetch("--layers", "1")[0] == 0


def test_a_folder_holds_one_part_or_one_repository(fetch, tmp_path):
    assert fetch("--layers", "1")[0] == 0
    for flags in (["--layers", "2"], []):
        status, err = fetch(*flags)
        assert status == 2 and f"holds {REPO} --layers 1" in err and "Choose another --local-dir" in err


@pytest.mark.parametrize("flags, words", [(["--layers", "3"], "found layer 3; expected 0 to 2"), (["--experts", "1:11"], "experts 0 to 10"), (["--experts", "0:1"], "no routed experts"),
                                          (["--part", "nothing"], "expected one of embedding"), (["--layers", "0", "--part", "router"], "found none. Choose another part"),
                                          (["--max-workers", "0"], "--max-workers: found 0")])  # fmt: skip
def test_a_part_that_is_not_there_is_one_line(fetch, hub, tmp_path, flags, words):
    status, err = fetch(*flags)
    assert status == 2 and words in err and not list(tmp_path.glob("w/*.safetensors*"))


# ---- a hostile repository ----


@pytest.mark.parametrize("damage", ["index", "header", "shape", "config"])
def test_a_hostile_repository_is_refused_before_a_tensor_is_fetched(fetch, hub, source, tmp_path, damage):
    hub.folder = tmp_path / "hostile"
    shutil.copytree(source, hub.folder)
    raw = bytearray((hub.folder / SECOND).read_bytes())
    index = json.loads((hub.folder / INDEX).read_text())
    config = json.loads((hub.folder / "config.json").read_text())
    if damage == "index":
        index["weight_map"]["model.layers.1.mlp.gate.weight"] = "../../etc/x.safetensors"
    elif damage == "header":
        raw[:8] = (2**31).to_bytes(8, "little")
    elif damage == "shape":
        raw[8:5000] = raw[8:5000].replace(b'"shape":[256]', b'"shape":[255]')
    else:
        config["n_routed_experts"] = 90_000
    (hub.folder / SECOND).write_bytes(raw)
    (hub.folder / INDEX).write_text(json.dumps(index))
    (hub.folder / "config.json").write_text(json.dumps(config))
    hub.digests.clear()
    status, err = fetch("--layers", "1")
    words = {"index": "'../../etc/x.safetensors'", "header": "expected a header of", "shape": "bytes by its dtype and shape", "config": "at most 200000"}[damage]
    assert status == 2 and words in err and not list(tmp_path.glob("w/*")), err


@pytest.mark.network
def test_the_real_hub_gives_the_attention_block_of_layer_1(tmp_path):
    folder = tmp_path / "block"
    assert download_weights.main(["moonshotai/Kimi-K2-Instruct", "--local-dir", str(folder), "--layers", "1", "--part", "attention"]) == 0
    found = stored(folder)
    assert len(found) == 13 and sum(t.numel() * t.element_size() for t in found.values()) == 101_165_280
    assert k2_main(["check-layer", str(folder), "1"]) == 0


def test_a_revision_whose_list_lacks_a_shard_is_never_called_whole(fetch, hub, tmp_path, monkeypatch, capfd):
    tree = hub.tree
    monkeypatch.setattr(hub, "tree", lambda: [entry for entry in tree() if entry["path"] != "model-2-of-3.safetensors"])
    status, err = fetch()
    assert status == 2 and "its index names model-2-of-3.safetensors" in err and "this revision is incomplete" in err
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path / "w")]) == 2
    assert "model-2-of-3.safetensors: named by" in capfd.readouterr().out


def test_files_of_two_commits_are_no_model(fetch, hub, tmp_path, source):
    assert fetch()[0] == 0
    record = json.loads((tmp_path / "w" / RECORD).read_text())
    record["planned"]["model-3-of-3.safetensors"] = "sha256:" + "0" * 64  # as an update leaves it that was cut before this file
    (tmp_path / "w" / RECORD).write_text(json.dumps(record))
    with pytest.raises(k2.K2Error, match="model-3-of-3.safetensors: of another commit than the one that was begun last"):
        k2.load(tmp_path / "w")


def test_a_file_that_the_next_commit_lacks_is_not_asked_for_for_ever(fetch, hub, tmp_path, monkeypatch, capfd):
    hub.extra.append({"type": "file", "path": "NOTES.md", "size": 5, "oid": "e" * 40})
    (hub.folder / "NOTES.md").write_bytes(b"notes")
    hub.extra[0]["oid"] = hub.digest("NOTES.md")
    try:
        monkeypatch.setattr(hub, "tree", lambda tree=hub.tree: [entry for n, entry in enumerate(tree()) if entry["path"] != "NOTES.md" or n])
        assert fetch()[0] == 0 and (tmp_path / "w" / "NOTES.md").exists()
        (tmp_path / "w" / "NOTES.md").unlink()
    finally:
        (hub.folder / "NOTES.md").unlink()
    monkeypatch.undo()
    hub.extra.clear()
    monkeypatch.setattr(download_weights, "Hub", lambda: Hub(hub.endpoint, patience=Patience(tries=3, first=0.001, timeout=2.0)))
    assert fetch()[0] == 0
    assert download_weights.main(["--verify", "--local-dir", str(tmp_path / "w")]) == 0


def test_a_folder_that_cannot_be_locked_says_why(fetch, monkeypatch):
    def no_locks(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("k2.download.lock_file", no_locks)
    status, err = fetch()
    assert status == 2 and "expected a file system with locks, found: No locks available" in err
