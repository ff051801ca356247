"""Fetch Kimi K2's weights, or the part of them that you need, and know that they are whole.

    python download_weights.py moonshotai/Kimi-K2-Instruct --local-dir weights/k2 --layers 1 --part attention

Interrupt it at will: the same command goes on. See k2/hub.py for how, and `python -m k2 plan` for what a machine can run.
"""

import argparse
import sys
import threading
import time
from pathlib import Path

from k2.__main__ import Parser, path_or_name, status_of
from k2.config import K2Error, printable
from k2.download import Download, check_index, check_room, locked, missing_bytes, missing_jobs, open_record, plan_download, run_download, verify
from k2.hub import Hub
from k2.needs import FAMILY
from k2.part import KINDS, parse_part


def main(arguments=None) -> int:
    """Run the command; 0, or 2 for something the user can mend, or 130 after Ctrl-C."""
    return status_of(lambda: run_options(build_parser().parse_args(arguments)), "stopped; the same command goes on from here", "the disk")


def run_options(options):
    """Fetch, or verify what is there."""
    if options.verify:
        check(options)
    else:
        download(options)


def build_parser() -> argparse.ArgumentParser:
    """All flags; those that `hf download` has too bear its names."""
    parser = Parser(prog="python download_weights.py", description="Fetch a checkpoint from the hub, or a part of it, into a folder. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are obeyed.")
    parser.add_argument("repo", nargs="?", type=path_or_name, metavar="REPO", help=f"such as moonshotai/Kimi-K2-Instruct, or {', '.join(name for name in FAMILY if FAMILY[name][1])}")
    parser.add_argument("--revision", default="main", help="a branch, a tag or a commit (default: main); the commit is recorded beside the files")
    parser.add_argument("--local-dir", type=path_or_name, metavar="DIR", help="where to put the files (default: weights/NAME)")
    parser.add_argument("--layers", metavar="0-3", help="only these layers; from 0 on with embedding and head, so that they run")
    parser.add_argument("--experts", action="append", metavar="1:17,203", help="of all routed experts only these of that layer")
    parser.add_argument("--part", action="append", metavar="KIND", help=f"only this kind of tensors: {', '.join(KINDS)}; or tokenizer")
    parser.add_argument("--max-workers", type=int, default=8, metavar="N", help="files at once (default: 8)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and fetch nothing")
    parser.add_argument("--verify", action="store_true", help="hash what --local-dir holds against the record; needs no network")
    return parser


def download(options):
    """The plan on stderr, the files, and the measured line."""
    if not options.repo:
        raise K2Error("REPO: expected a repository, found none. Write: python download_weights.py moonshotai/Kimi-K2-Instruct --local-dir weights/k2")
    if options.max_workers < 1:
        raise K2Error(f"--max-workers: found {options.max_workers}; expected 1 or more.")
    part, repo = parse_part(options.layers, options.experts, options.part), (FAMILY.get(options.repo) or (None, options.repo))[1]
    if repo is None:
        raise K2Error(f"{options.repo}: expected a repository; K2-mini is shipped in k2/mini. Write: python -m k2 generate \"def \"")
    folder, hub = folder_of(options), Hub()
    plan = plan_download(hub, hub.repository(repo, options.revision), part, options.max_workers)
    overhead = hub.received
    if options.dry_run:
        describe(plan, folder, plan.jobs, overhead)
        for job in plan.jobs:
            print(f"{job.size:>16,}  {job.name}")
        return
    with locked(folder):
        record = open_record(plan, folder)
        check_index(plan, record)
        jobs = missing_jobs(plan, record)
        describe(plan, folder, jobs, overhead)
        check_room(jobs, folder)
        progress = Progress(missing_bytes(jobs, folder))
        try:
            run_download(hub, plan, jobs, record, options.max_workers, progress.add)
        finally:
            progress.end()
    print(f"done: {hub.received:,} bytes received in {progress.seconds():.1f} s, {overhead:,} of them to plan; every hash is recorded, --verify checks them again", file=sys.stderr)


def folder_of(options) -> Path:
    """Where the files are: --local-dir, or else weights/NAME."""
    repo = (FAMILY.get(options.repo) or (None, options.repo))[1] or ""
    given = options.local_dir or (f"weights/{repo.rpartition('/')[2]}" if repo else ".")
    return Path(given)


def describe(plan: Download, folder: Path, jobs, overhead: int):
    """What will happen, before it does."""
    repository, size = plan.repository, sum(job.remote for job in plan.jobs)
    print(f"{repository.name} at {repository.commit} {plan.part.flags()}".rstrip(), file=sys.stderr)
    print(f"{len(plan.jobs)} files, {size:,} bytes, into {folder}; {len(jobs)} files, {missing_bytes(jobs, folder):,} bytes are missing{f'; {overhead:,} bytes were read to find them' if overhead else ''}", file=sys.stderr)
    if repository.left_out:
        print(f"left out: {printable(', '.join(sorted(repository.left_out)[:8]))}{', ...' if len(repository.left_out) > 8 else ''}; nothing here runs code from a repository", file=sys.stderr)


def check(options):
    """Hash the files that are there; the ones that are wrong, and what repairs them."""
    folder = folder_of(options)
    if not folder.is_dir():
        raise K2Error(f"{folder}: expected a folder to verify, found none. Name it with --local-dir.")
    with locked(folder):
        problems, command = verify(folder, lambda name: print(f"hashing {name}", file=sys.stderr) if sys.stderr.isatty() else None)
    for line in problems:
        print(printable(line))
    if problems:
        raise K2Error(f"{folder}: {len(problems)} files are missing or not as they were fetched. Run this, it fetches only these: {command}")
    print(f"{folder}: every file is as it was fetched", file=sys.stderr)


class Progress:
    """One line with rate and time left, where a person is looking."""

    def __init__(self, total: int):
        self.total, self.done, self.started, self.shown = total, 0, time.monotonic(), 0.0
        self.lock, self.visible = threading.Lock(), sys.stderr.isatty()

    def add(self, count: int):
        """So many bytes more are there; called from every worker."""
        with self.lock:
            self.done += count
            now = time.monotonic()
            if self.visible and now - self.shown > 0.2:
                self.shown = now
                print(f"\r{self.line()}\x1b[K", end="", file=sys.stderr, flush=True)

    def line(self) -> str:
        """12.3 of 1,029.2 GB, 1.2 %, 85.1 MB/s, 3:19:21 left."""
        rate = self.done / max(self.seconds(), 1e-3)
        left = int(max(self.total - self.done, 0) / rate) if rate > 0 else 0
        return f"{self.done / 1e9:,.2f} of {self.total / 1e9:,.2f} GB, {self.done / max(self.total, 1):.1%}, {rate / 1e6:,.1f} MB/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def end(self):
        """Leave the line as it stands."""
        if self.visible and self.done:
            print(f"\r{self.line()}\x1b[K", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
