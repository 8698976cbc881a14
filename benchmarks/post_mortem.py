"""One published mistake of the LoRA recipe at a time: runs, figure and table of docs/post-mortem.md.

    python benchmarks/post_mortem.py --jobs 2 --docs          all of it, into docs/
    python benchmarks/post_mortem.py --variants sound sigmoid --seeds 0 --steps 8
    python benchmarks/post_mortem.py --read                   figure and table of what is finished

Each run is `python -m rlhf_exp experiment=post_mortem ...` in a process of its own; they share one outputs folder,
where SFT and reward model of a seed are trained once. What is finished is not run again, and what was interrupted
goes on: run folders are found by their key. Figure and table are written to the outputs folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import mistakes  # noqa: E402
from mistakes import DEFAULT, VARIANTS  # noqa: E402
from post_mortem_page import block, put, write_figure  # noqa: E402

from rlhf_exp.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError  # noqa: E402
from rlhf_exp.store.runs import PREFIX  # noqa: E402

FIGURE, PAGE = "post_mortem.png", "post_mortem.md"
DOCS_PAGE, DOCS_FIGURE = ROOT / "docs/post-mortem.md", ROOT / "docs/images" / FIGURE
EVERY = 60.0  # seconds between lines that say how far it is
TAIL = 12  # lines of a failed run's log that are shown


@dataclass
class Job:
    """One run: its words on the command line, its place, and whether it is there."""

    variant: str
    seed: int
    words: list[str]
    folder: Path
    log: Path
    steps: int
    finished: bool
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}"

    def done(self) -> int:
        """Iterations that it has."""
        if self.finished:
            return self.steps
        try:
            return (self.folder / mistakes.METRICS).read_text(encoding="utf-8").count("\n")
        except OSError:
            return 0


def plan(variant: str, seed: int, options: argparse.Namespace) -> Job:
    """Where the run is, by the key of all that can change it. InputError if it cannot be made."""
    from rlhf_exp import compose
    from rlhf_exp.stages import plan as plans

    threads = max(1, (options.threads or options.jobs) // options.jobs)
    words = ["experiment=post_mortem", "stage=ppo", f"seed={seed}", f"threads={threads}"]
    words += [
        f"output_dir={options.outputs}",
        "tracking=none",
        *VARIANTS[variant].overrides,
        *options.overrides,
    ]
    words += [f"ppo.steps={options.steps}"] * bool(options.steps)
    config, choices = compose.compose(words)
    target = plans.make(config, choices).target
    place = target.key[:PREFIX]
    folder = options.outputs / target.stage / place
    log = options.outputs / "logs" / f"{place}.log"
    return Job(variant, seed, words, folder, log, config.ppo.steps, target.found is not None)


def start(job: Job) -> None:
    """The run's process. It is out of reach of the terminal's Ctrl-C, which we pass on."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    threads = next(word.split("=")[1] for word in job.words if word.startswith("threads="))
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with job.log.open("a", encoding="utf-8") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_exp", *job.words],
            env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(jobs: Sequence[Job], at_once: int, clock: Progress) -> list[Job]:
    """Run what is missing, `at_once` together; those that failed. A signal ends all after their next step."""
    waiting, running, failed = deque(job for job in jobs if not job.finished), [], []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.popleft())
                start(running[-1])
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                job.finished = job.process.returncode == 0
                if not job.finished:
                    failed.append(job)
                    last = job.log.read_text(encoding="utf-8").splitlines()[-TAIL:]
                    say(f"{job.name} ended with {job.process.returncode}; the end of {job.log}:", *last)
                else:
                    clock.say(f"{job.name} done")
            clock.now_and_then(running)
    finally:
        for job in running:
            job.process.terminate()  # saves and ends with 75: the same command goes on
        for job in running:
            job.process.wait()
    return failed


class Progress:
    """How far all of them are, by iterations; SFT and reward models count as nothing, so it begins pessimistic."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs, self.began, self.printed = jobs, time.monotonic(), time.monotonic()
        self.before = sum(job.done() for job in jobs)

    def say(self, what: str) -> None:
        self.printed = time.monotonic()
        spent, done = self.printed - self.began, sum(job.done() for job in self.jobs)
        left = sum(job.steps for job in self.jobs) - done
        new = done - self.before
        eta = f"eta {minutes(spent / new * left)}" if new and left else "eta ?" * bool(left)
        finished = sum(job.finished for job in self.jobs)
        say(f"[{finished:2}/{len(self.jobs)}]  {minutes(spent)}  {what}  {eta}".rstrip())

    def now_and_then(self, running: Sequence[Job]) -> None:
        if time.monotonic() - self.printed >= EVERY:
            self.say(", ".join(f"{job.name} {job.done()}/{job.steps}" for job in running))


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def write(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Figure and table of the finished runs, in the outputs folder and, with --docs, in docs/."""
    trials = [mistakes.read(job.variant, job.seed, job.folder, job.log) for job in jobs if job.finished]
    if not trials:
        say("nothing is finished")
        return
    words = ["python benchmarks/post_mortem.py", *(["--docs"] * options.docs)]
    words += [f"--steps {options.steps}"] * bool(options.steps)
    words += ["--overrides", *options.overrides] * bool(options.overrides)
    places = [(options.outputs / FIGURE, FIGURE, options.outputs / PAGE)]
    if options.docs:
        places.append((DOCS_FIGURE, f"images/{FIGURE}", DOCS_PAGE))
    for figure, link, page in places:
        found = block(trials, " ".join(words), link)
        write_figure(figure, trials)
        text = put(page.read_text(encoding="utf-8"), found) if page == DOCS_PAGE else f"{found}\n"
        page.write_text(text, encoding="utf-8")
        say(f"written: {figure}, {page}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="iterations; default: the experiment's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, help="CPU threads of all runs together; default: one each")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/post_mortem"))
    parser.add_argument("--overrides", nargs="+", default=[], help="more of each run's words: model=tiny ..")
    parser.add_argument("--read", action="store_true", help="run nothing")
    parser.add_argument("--docs", action="store_true", help="also write docs/post-mortem.md and its figure")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # seeds inside: runs that start together have an SFT model each, and do not wait for one another's
        jobs = [plan(variant, seed, options) for variant in options.variants for seed in options.seeds]
    except InputError as error:
        say(*error.problems)
        return EXIT_BAD_INPUT
    clock = Progress(jobs)
    failed: list[Job] = []
    if not options.read:
        clock.say(f"{sum(not job.finished for job in jobs)} to run")
        try:
            failed = run(jobs, options.jobs, clock)
        except KeyboardInterrupt:
            say("stopped; the same command continues")
            return EXIT_INTERRUPTED
    write(jobs, options)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
