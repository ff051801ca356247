"""The hub's answers, one at a time, against a local one: what a repository is, ranges of bytes, headers, waits."""

import json
import shutil
import time
from pathlib import Path

import local_hub
import pytest
from local_hub import COMMIT, REPO, LocalHub
from small import random_model, small_config

import k2
from k2 import hub as hub_module
from k2.__main__ import main
from k2.checkpoint import INDEX, read_header
from k2.hub import Changed, Hub, HubFile, Patience, Stopped, is_kept, layout_of, plain_etag, retry_after
from k2.part import Part

SHARD = "model-2-of-3.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small INT4 checkpoint in three shards."""
    directory = tmp_path_factory.mktemp("source") / "k2"
    k2.save(random_model(small_config(hidden_size=160, moe_intermediate_size=32)), directory, format="int4")
    return directory


@pytest.fixture
def server(source):
    found = LocalHub(source)
    yield found
    found.close()


@pytest.fixture
def client(server, monkeypatch):
    """A client whose waits are written down and not waited."""
    found = Hub(server.endpoint, patience=Patience(tries=4, timeout=2.0))
    found.waits = []
    monkeypatch.setattr(found.stop, "wait", lambda seconds: found.waits.append(seconds) or found.stop.is_set())
    return found


def bytes_of(client, begin, end, name=SHARD) -> bytes:
    repository = client.repository(REPO)
    return b"".join(client.stream(name, client.url(repository, name), begin, end, repository.files[name]))


def test_a_repository_is_its_files_at_a_commit_with_sizes_and_hashes(client, source, server):
    found = client.repository(REPO)
    assert found.name == REPO and found.commit == COMMIT and set(found.files) == {path.name for path in source.iterdir()}
    for name, file in found.files.items():
        assert file == HubFile(name, (source / name).stat().st_size, f"{'sha256' if server.large(name) else 'git-sha1'}:{server.digest(name)}")
    assert client.url(found, SHARD) == f"{server.endpoint}/{REPO}/resolve/{COMMIT}/{SHARD}"
    assert client.etag(found, found.files[SHARD]) == server.digest(SHARD)


def test_a_repository_without_a_config_is_no_model(client, server, tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    server.folder = tmp_path
    with pytest.raises(k2.K2Error, match="expected a model with config.json, found README.md"):
        client.repository(REPO)


REVISION, TREE = f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}/tree/{COMMIT}"
FILE = {"type": "file", "path": "config.json", "size": 9, "oid": "a" * 40}


@pytest.mark.parametrize("path", [REVISION, TREE])
@pytest.mark.parametrize("answer", [{}, [], None, 5, "x", [None], [{}], [{"path": 5}], {"id": 5, "sha": 6}, {"id": REPO, "sha": None}, {"id": "../x", "sha": COMMIT},
                                    *[[FILE | {"size": size}] for size in (None, -1, "9", True, 1.5)], [{**FILE, "oid": None}], [FILE | {"lfs": "x"}], [FILE | {"lfs": {"oid": 5}}], [FILE | {"path": []}]])  # fmt: skip
def test_an_answer_of_another_kind_is_one_line(client, server, path, answer):
    server.faults[path] = [lambda to, *rest: to.json(answer)] * 4
    with pytest.raises(k2.K2Error, match="expected") as raised:
        client.repository(REPO)
    assert len(str(raised.value).splitlines()) == 1


def test_a_list_of_files_goes_on_at_the_next_page(client, server, source):
    entries = server.tree()

    def first(to, *rest):
        to.plain(200, json.dumps(entries[:3]).encode(), {"Link": f'<{TREE}?cursor=3>; rel="next"'})

    server.faults[TREE] = [first, lambda to, *rest: to.json(entries[3:])]
    assert set(client.repository(REPO).files) == {path.name for path in source.iterdir()}


@pytest.mark.parametrize("begin, end", [(0, 1), (0, 8), (5, 2000), (0, 60_000), (59_990, 60_000)])
def test_a_range_is_those_bytes_and_no_other_crosses_the_network(client, source, server, begin, end):
    assert bytes_of(client, begin, end) == (source / SHARD).read_bytes()[begin:end]
    assert server.sent == end - begin == client.received


def test_a_header_is_read_by_two_ranges(client, source, server):
    header, start = client.header(client.repository(REPO), SHARD)
    assert header == read_header(source / SHARD)
    assert server.sent == start and [request[2] for request in server.requests if request[1].startswith("/cdn/")] == ["bytes=0-7", f"bytes=8-{start - 1}"]


def test_a_layout_is_read_from_config_index_and_headers_alone(client, source, server):
    found, starts = layout_of(client, client.repository(REPO), Part())
    held = k2.Checkpoint(source)
    assert (found.config, found.weight_map, found.headers) == (held.config, held.weight_map, held.headers)
    small = sum((source / name).stat().st_size for name in ("config.json", INDEX))
    assert server.sent == client.received == small + sum(starts.values())


# ---- waits ----


def test_waits_double_up_to_the_longest_and_end(client, server):
    server.faults[SHARD] = [local_hub.status(503)] * 9
    with pytest.raises(k2.K2Error, match="4 failures in a row, the last: the hub says 503. What has arrived is kept"):
        bytes_of(client, 0, 10)
    assert client.waits == [1.0, 2.0, 4.0] and Patience().seconds(20, None) == 60.0


def test_a_server_is_waited_for_as_long_as_it_asks_within_reason(client, server):
    server.faults[SHARD] = [local_hub.status(429, Retry_After="7"), local_hub.status(503, Retry_After="86400")]
    assert len(bytes_of(client, 0, 10)) == 10 and client.waits == [7.0, 300.0]


def test_failures_are_counted_anew_when_bytes_come(client, server, source, monkeypatch):
    monkeypatch.setattr(hub_module, "PROGRESS", 1000)
    server.faults[SHARD] = [local_hub.short(0.2)] * 9
    assert bytes_of(client, 0, 60_000) == (source / SHARD).read_bytes()[:60_000] and set(client.waits) <= {1.0, 2.0}


def test_a_connection_that_gives_a_byte_at_a_time_and_breaks_does_not_go_on_for_ever(client, server):
    server.faults[SHARD] = [local_hub.short(0.0001)] * 100
    with pytest.raises(k2.K2Error, match="4 failures in a row"):
        bytes_of(client, 0, 60_000)


def test_retry_after_is_a_number_or_a_date():
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert retry_after({"Retry-After": "12"}) == 12.0 and 90 < retry_after({"Retry-After": soon}) <= 100
    assert [retry_after({"Retry-After": text}) for text in ("", "soon", "-5", "1e9")] == [None] * 4 and retry_after({}) is None


def test_a_stop_ends_a_stream_and_a_wait(client, server):
    stream = client.stream(SHARD, client.url(client.repository(REPO), SHARD), 0, 60_000, client.repository(REPO).files[SHARD])
    server.faults[SHARD] = [local_hub.short(0.5)]
    next(stream)
    client.stop.set()
    with pytest.raises(Stopped):
        list(stream)


def test_an_etag_that_changed_is_noticed_before_a_byte_is_taken(client, server):
    repository = client.repository(REPO)
    stream = client.stream(SHARD, client.url(repository, SHARD), 0, 10, repository.files[SHARD], etag="another")
    with pytest.raises(Changed, match="its ETag was another"):
        next(stream)
    assert client.received == 0 and plain_etag('W/"abc"') == "abc" and plain_etag(None) is None


def test_a_size_that_is_not_the_listed_one_is_refused(client, server, tmp_path, source):
    repository = client.repository(REPO)
    server.folder = tmp_path / "longer"
    shutil.copytree(source, server.folder)
    (server.folder / SHARD).write_bytes(b"x" * 100)
    with pytest.raises(k2.K2Error, match="found 100"):
        client.etag(repository, repository.files[SHARD])


def test_a_redirect_from_encrypted_to_open_or_to_a_file_is_not_followed(client):
    for url, location in (("https://a/b", "http://a/b"), ("http://a/b", "file:///etc/passwd"), ("http://a/b", "ftp://a/b"), ("http://a/b", "")):
        with pytest.raises(k2.K2Error, match="redirected to"):
            client.next_url(url, location)
    assert client.next_url("https://a/b", "/c") == "https://a/c" and client.next_url("http://a/b", "https://x/y") == "https://x/y"


def test_a_small_file_whose_hash_is_wrong_is_asked_for_again(client, server, source):
    repository = client.repository(REPO)
    server.faults["config.json"] = [local_hub.flip(10)] * 2
    assert client.small(repository, "config.json") == (source / "config.json").read_bytes()
    server.faults["config.json"] = [local_hub.flip(10)] * 3
    with pytest.raises(k2.K2Error, match="found another hash three times"):
        client.small(repository, "config.json")


@pytest.mark.parametrize("raw, words", [(b"{", "expected JSON"), (b"[]", "expected a JSON object"), (b'{"a": 1, "a": 2}', "the key a twice"), (b"\xff", "expected JSON")])
def test_json_of_another_kind_is_refused(client, server, source, tmp_path, raw, words):
    server.folder = tmp_path / "damaged"
    shutil.copytree(source, server.folder)
    (server.folder / INDEX).write_bytes(raw)
    with pytest.raises(k2.K2Error, match=words):
        client.json(client.repository(REPO), INDEX)


def test_a_shard_or_an_index_that_the_repository_lacks_is_refused(client, server, source, tmp_path):
    server.folder = tmp_path / "lacking"
    shutil.copytree(source, server.folder)
    (server.folder / SHARD).unlink()
    with pytest.raises(k2.K2Error, match="the index names this shard, and the repository has no such file"):
        layout_of(client, client.repository(REPO), Part())
    (server.folder / INDEX).unlink()
    with pytest.raises(k2.K2Error, match=f"expected {INDEX} of at most 100000000 bytes, found none"):
        layout_of(client, client.repository(REPO), Part())


@pytest.mark.parametrize("name", ["model-1-of-61.safetensors", "config.json", "tiktoken.model", "chat_template.jinja", "README.md", "LICENSE"])
def test_what_is_read_or_belongs_to_it_is_kept(name):
    assert is_kept(name)


@pytest.mark.parametrize("name", ["a.py", "a.bin", "a.pt", "a.pkl", "a/b.json", "../b.json", "/b.json", "..\\b.json", ".b.json", "a b.json", "b.json\n", "k2-download.json", "K2-Download.JSON", "x.part.json", "x.PART", "C:b.json", "", "a" * 300 + ".json"])
def test_code_pickles_paths_and_our_own_names_are_not(name):
    assert not is_kept(name)


# ---- inspect, over the network ----


@pytest.fixture
def inspect(server, monkeypatch, capfd):
    monkeypatch.setattr(hub_module, "Hub", lambda: Hub(server.endpoint, patience=Patience(tries=2, first=0.01)))

    def run(*arguments):
        status = main(["inspect", *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def test_a_repository_is_inspected_as_its_download_would_be(inspect, server, source):
    status, out, err = inspect(REPO)
    assert status == 0 and f"{REPO} at {COMMIT}: {server.sent:,} bytes read" in err
    headers = sum(int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in source.glob("*.safetensors"))
    assert server.sent == headers + sum((source / name).stat().st_size for name in ("config.json", INDEX))
    assert inspect(source)[1] == out
    assert inspect(REPO, "*.gate.weight")[1] == inspect(source, "*.gate.weight")[1]
    assert json.loads(inspect(REPO, "--json")[1]) == json.loads(inspect(source, "--json")[1])


def test_a_repository_that_is_not_what_its_config_implies_is_refused(inspect, server, source, tmp_path):
    server.folder = tmp_path / "other"
    shutil.copytree(source, server.folder)
    config = json.loads((source / "config.json").read_text())
    (server.folder / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 24}))
    status, out, err = inspect(REPO)
    assert status == 2 and out == "" and "expected BF16 [24]" in err and "more. Expected what config.json implies" in err


def test_statistics_want_the_tensors(inspect):
    status, _, err = inspect(REPO, "--statistics")
    assert status == 2 and "--statistics reads the tensors" in err


def test_an_answer_that_does_not_end_is_left_when_the_range_is_there(client, server, source):
    server.faults[SHARD] = [local_hub.endless]
    assert bytes_of(client, 100, 4000) == (source / SHARD).read_bytes()[100:4000]
    assert server.arrived.wait(5), "the server still sends"


@pytest.mark.parametrize("location", ["http://[", "http://host/\u00e9", "http://host:port/x", "http://a b/"])
def test_a_redirect_to_no_address_is_one_line(client, server, location):
    server.faults[SHARD] = [local_hub.away(location)] * 9
    with pytest.raises(k2.K2Error, match="redirected to .*expected another https address"):
        bytes_of(client, 0, 100)


@pytest.mark.parametrize("endpoint", ["http://host:abc", "hf-mirror.com", "ftp://host", "http://[", "http://", "http://a b"])
def test_a_mistyped_endpoint_is_one_line_before_anything_is_asked(endpoint):
    with pytest.raises(k2.K2Error, match="HF_ENDPOINT: expected an address such as https://huggingface.co, found"):
        Hub(endpoint)


def test_a_date_beyond_all_calendars_is_no_wait():
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 +99999999999999999"}) is None
