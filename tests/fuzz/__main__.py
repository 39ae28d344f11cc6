"""Runs random programs with and without acceleration: `python -m fuzz --programs 1000 --seed 0 --gate both`.

Programs run in processes of their own, so that one that crashes is a failure like others. Each failure is shrunk, and
printed as a program that shows it by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from queue import Queue
from typing import Any

# Products of the arbiter are small, and other processes have work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_CLEAR = 25
"""Programs after which a process forgets what JAX has compiled."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one (default: %(default)s)")
    parser.add_argument("--gate", choices=("on", "off", "both"), default="off", help="the decline gate")
    parser.add_argument("--kinds", default="", help="only these, with commas between")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no program after so long")
    parser.add_argument("--out", type=Path, help="a folder for failures, a file each")
    parser.add_argument("--most", type=int, default=10, help="stop after so many failures (default: %(default)s)")
    parser.add_argument("--no-shrink", action="store_true", help="show failures as they were found")
    parser.add_argument("--show", action="store_true", help="print the program of --seed, and run nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.show:
        from . import generator

        print(generator.generate(arguments.seed, _kinds(arguments)).script(gate=arguments.gate == "on"))
        return 0
    return _work(arguments) if arguments.worker else _run(arguments)


def _kinds(arguments: argparse.Namespace) -> tuple[str, ...]:
    from . import generator

    return tuple(arguments.kinds.split(",")) if arguments.kinds else generator.KINDS


# --- a process that runs programs ----------------------------------------------------------------


def _work(arguments: argparse.Namespace) -> int:
    """Reads lines "SEED GATE", and says for each what became of it, in a line of JSON."""
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    from . import check, generator, shrink

    kinds = _kinds(arguments)
    for count, line in enumerate(sys.stdin):
        seed, setting = line.split()
        program = generator.generate(int(seed), kinds)
        with check.gate(setting == "on"):
            try:
                outcome = check.check(program)
            except Exception as error:  # of the arbiter
                outcome = check.Outcome(skipped=f"{type(error).__name__}: {error}")
            said: dict[str, Any] = {"kind": program.kind, **vars(outcome)}
            if outcome.failure or outcome.plain_wrong:
                small = program
                if outcome.failure and not arguments.no_shrink:

                    def fails(smaller: Any, sort: str = outcome.sort) -> bool:
                        try:
                            return check.check(smaller, plain=False).sort == sort
                        except Exception:  # it has become no program
                            return False

                    small = shrink.shrink(program, fails)
                    said["failure"] = check.check(small).failure or outcome.failure
                said["script"] = small.script(gate=setting == "on")
        print("\x1e" + json.dumps(said), flush=True)
        if count % _CLEAR == _CLEAR - 1:
            jax.clear_caches()
    return 0


# --- the process that hands them out -------------------------------------------------------------


class _Worker(threading.Thread):
    """Feeds one process, and starts another one when it dies."""

    def __init__(
        self, work: Queue[tuple[int, str]], done: Queue[dict[str, Any] | None], kinds: str, *flags: str
    ) -> None:
        super().__init__(daemon=True)
        self._work, self._done = work, done
        package = __spec__.parent
        self._command = [
            sys.executable,
            *(["-P"] if sys.flags.safe_path else []),
            "-m",
            package,
            "--worker",
            "--kinds",
            kinds,
            *flags,
        ]
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> None:
        while not self._work.empty():
            seed, gate = self._work.get()
            self._done.put({"seed": seed, "gate": gate, **self._one(seed, gate)})
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
        self._done.put(None)

    def _one(self, seed: int, gate: str) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{seed} {gate}\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("\x1e"):
                return dict(json.loads(line[1:]))
        self._process = None
        code = process.wait()
        return {"failure": f"the process ended with {code}", "sort": "crash", "kind": "?"}


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    gates = ("on", "off") if arguments.gate == "both" else (arguments.gate,)
    seeds = range(arguments.seed, arguments.seed + arguments.programs)
    work: Queue[tuple[int, str]] = Queue()
    for seed in seeds:
        for gate in gates:
            work.put((seed, gate))
    done: Queue[dict[str, Any] | None] = Queue()
    flags = ["--no-shrink"] if arguments.no_shrink else []
    workers = [_Worker(work, done, arguments.kinds, *flags) for _ in range(arguments.jobs)]
    started = time.monotonic()
    counts: Counter[str] = Counter()
    with tqdm(total=work.qsize(), unit="program", dynamic_ncols=True) as bar:
        for worker in workers:
            worker.start()
        running = len(workers)
        while running:
            said = done.get()
            if said is None:
                running -= 1
                continue
            bar.update()
            _tell(said, counts, arguments, bar)
            bar.set_postfix_str(", ".join(f"{n} {what}" for what, n in counts.items() if what != "programs"))
            if counts["failures"] >= arguments.most or time.monotonic() - started > arguments.seconds:
                while not work.empty():
                    work.get()
    print(", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return int(counts["failures"] > 0)


def _tell(said: dict[str, Any], counts: Counter[str], arguments: argparse.Namespace, bar: Any) -> None:
    counts["programs"] += 1
    counts["with calls"] += said.get("calls", 0) > 0
    counts["with attention"] += said.get("attentions", 0) > 0
    counts["with epilogues"] += said.get("epilogues", 0) > 0
    counts["skipped"] += bool(said.get("skipped"))
    counts["where XLA is wrong"] += bool(said.get("plain_wrong"))
    counts["mostly unjudged"] += said.get("unjudged", 0) > 0.5
    counts["failures"] += bool(said["failure"])
    what = said["failure"] or said.get("skipped") or said.get("plain_wrong")
    if not what:
        return
    name = "failure" if said["failure"] else "skipped" if said.get("skipped") else "XLA is wrong"
    again = f"python -m fuzz --programs 1 --seed {said['seed']} --gate {said['gate']}"
    if arguments.kinds:
        again += f" --kinds {arguments.kinds}"
    text = f"# {name}, {said['kind']}: {' '.join(what.split())[:500]}\n# again: {again}\n{said.get('script', '')}"
    if name == "failure":
        bar.write(text)
    else:
        bar.write(text.partition("\n")[0] + f" (seed {said['seed']})")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{name.replace(' ', '_')}-{said['seed']}-{said['gate']}.py").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
