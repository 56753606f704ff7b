"""The few helpers that all six chapters share; no training loop lives here: the loops are the lessons.
To take a chapter into a project of your own, copy its folder and this file. A program that takes only a model from a
chapter needs no argparse, requests or matplotlib: they are imported by the functions that use them."""
import contextlib
import ctypes
import hashlib
import json
import math
import os
import shlex
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

DATA_DIR = Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parent / "data"))


class InputError(ValueError):
    """Something the user can put right. Its message is one sentence that names the thing and what to do."""


def run(main: Callable[[], None], go_on: str = "") -> None:
    """Call main(). What a user can cause ends in one sentence and a non-zero exit status; a bug keeps its traceback."""
    with contextlib.suppress(OSError, AttributeError):  # glibc (no other C library) is told to keep freed memory
        sys.stdout.reconfigure(errors="backslashreplace")  # what this terminal can't show is no reason to stop
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; the most that a glibc before 2.35 takes
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nstopped{go_on and f'; go on with: python {shlex.join(sys.argv)} {go_on}'}", file=sys.stderr)
        sys.exit(130)  # what a shell reports for Ctrl-C
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        sys.exit("error: the device ran out of memory; try a smaller --batch-size, or what else --help says of memory.")


def stand_in_notice(name: str, real: str) -> None:
    """Say in a box that `name` stands in for the data set `real`; nothing where real is empty, as for a real set."""
    line = f"| STAND-IN: this run uses {name} in place of {real}. Its figures are not {real}'s. |"
    if real:
        print(edge := f"+{'-' * (len(line) - 2)}+", line, edge, sep="\n")


def number(kind: type, interval: str) -> Callable[[str], float]:
    """A type for argparse: an int or a float in an interval such as "[1, inf)" or "(0, 1]"; nan is in none."""
    def number(text: str) -> float:
        from argparse import ArgumentTypeError
        value, (low, high) = kind(text), map(float, interval[1:-1].split(","))
        if not (low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"):
            raise ArgumentTypeError(f"{text} is not in {interval}")
        return value
    return number


count, positive, share = number(int, "[1, inf)"), number(float, "(0, inf)"), number(float, "[0, 1)")  # --epochs, --lr


def parser(doc: str, script: str, *common: str):
    """An ArgumentParser with --out (by default `outputs` beside the script's file) and the named ones of five more."""
    from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
    class Help(ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):  # "(default: None)" would say less than nothing
            return action.help if action.default is None else super()._get_help_string(action)
    options = ArgumentParser(description=doc.split("\n")[0], usage="%(prog)s [options]", formatter_class=Help)
    options.add_argument("--out", type=Path, default=Path(script).resolve().parent / "outputs", help="where to write")
    common_options = {
        "device": dict(default="auto", help="auto, cpu, cuda or mps"),
        "dtype": dict(choices=["auto", "float32", "bfloat16"], default="auto", help="auto: the faster one here"),
        "seed": dict(type=number(int, "[0, 4294967295]"), default=0, help="decides everything that is drawn at random"),
        "compile": dict(action="store_true", help="torch.compile: slow to start, then faster steps"),
        "resume": dict(action="store_true", help="with the options of a stopped run: go on from its checkpoint.pt")}
    for name in common:
        options.add_argument(f"--{name}", **common_options[name])
    return options


def parse_args(options):
    """The values of all options, device and dtype as torch has them. The folder --out is made, and must be writable."""
    args = options.parse_args()
    if "device" in args:
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        try:
            args.device = torch.zeros(1, device=best if args.device == "auto" else args.device).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {args.device}: this machine has no such device; use --device auto.") from error
    if "dtype" in args:
        args.dtype = pick_dtype(args.device) if args.dtype == "auto" else getattr(torch, args.dtype)
    write_atomically(args.out / ".probe", lambda file: None)  # fails now and not after the training
    (args.out / ".probe").unlink(missing_ok=True)
    return args


def pick_dtype(device: torch.device) -> torch.dtype:
    """The one of bfloat16 and float32 in which this device multiplies matrices faster: what --dtype auto means."""
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    ## CPUs with AMX or AVX512-BF16 are several times faster in bfloat16, others slower. The two take turns here.
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in list(seconds) * 20:
        x, w = torch.ones(1024, 256, dtype=dtype), torch.ones(768, 256, dtype=dtype)
        seconds[dtype] = min(seconds[dtype], timeit.timeit(lambda: F.linear(x, w), number=1))
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trainable parameters; a tensor that two modules share counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def progress(done: int, total: int, begun: float, text: str, unit: str, per: float = 1.0) -> None:
    """After each of total things, `per` units each: one line (20 if piped) of percent, text, units per second, ETA."""
    tty, seconds = sys.stdout.isatty(), time.perf_counter() - begun
    if tty or 20 * done // total > 20 * (done - 1) // total:
        rate, left = per * done / seconds, round(seconds / done * (total - done))
        line = f"{done / total:4.0%}  {text}  {rate:,.0f} {unit}/s  ETA {left // 60}:{left % 60:02}"
        print(f"{line:79.79}", end="\r" if tty else "\n", flush=True)


def download(urls: list[str], path: Path, sha256: str, timeout: tuple[float, float] = (10, 30)) -> Path:
    """Fetch a file from the mirrors in turn; go on with a partial one; verify; only then give it its name.

    timeout: seconds to connect, of silence. ConnectionError: no mirror sends all of it; InputError: another hash."""
    import requests

    def matches(path: Path) -> bool:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "md5" if len(sha256) == 32 else "sha256").hexdigest() == sha256

    if path.exists():
        if matches(path):
            return path
        raise InputError(f"{path} is not the expected file (its hash differs); delete it to download it again.")
    part, problems, begun = path.with_name(f"{path.name}.{os.getpid()}.part"), {}, time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*part"):
        if time.time() - left.stat().st_mtime > 2 * timeout[1]:  # by a process that was stopped
            os.replace(left, part)
    for url in [url for url in urls for _ in range(5)]:  # what one mirror began, the next may finish
        if problems.get(url, "").startswith(("4", "wrong")):
            continue  # it won't change its mind
        try:
            with open(part, "ab") as file, requests.get(
                    url, headers={"Range": f"bytes={(have := file.tell())}-", "Accept-Encoding": "identity"},
                    stream=True, timeout=timeout) as reply:
                if reply.status_code == 200:  # all of it: this server knows no Range
                    file.truncate(0)
                if reply.status_code != 416:  # 416: there is no more than what we have
                    reply.raise_for_status()
                    blocks = 1 + int(reply.headers.get("Content-Length", -(2**16))) // 2**16  # 0: not known
                    for i, block in enumerate(reply.iter_content(2**16), 1):
                        file.write(block)
                        if i <= blocks:
                            progress(i, blocks, begun, path.name, "MB", per=2**16 / 1e6)
        except requests.RequestException as error:
            problems[url] = str(getattr(error.response, "status_code", type(error).__name__))
            continue
        if matches(part):
            os.replace(part, path)
            return path
        part.unlink()
        problems[url] = "pieces that do not fit" if have else "wrong hash"
    raise (InputError if "wrong hash" in problems.values() else ConnectionError)(
        f"{path.name} could not be downloaded ({problems}); its place, if you fetch it elsewhere, is {path}.")


def write_atomically(path: Path, write: Callable, *content) -> None:
    """write(*content, file), such as torch.save(state, file). Whenever it is stopped, path holds old or new, whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # its own, should two processes write at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(*content, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only in the system's cache, before the name moves
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"cannot write {path} ({cause}); free some space or choose another --out.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def load_checkpoint(path: Path, script: str, options: dict = {}) -> dict:
    """What `script` wrote, tensors on the CPU. Anything else is an InputError, and so is another value of an option."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        assert state["script"] == script
    except Exception as error:
        what = "is damaged, or not from " + script if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; make it with: python {script}") from error
    if other := [f"--{k.replace('_', '-')} {v}" for k, v in state.get("options", {}).items() if options.get(k, v) != v]:
        raise InputError(f"{path} is of a run with {' '.join(other)}; go on with the same.")
    return state


def save_metrics(args, script: str, data, model: torch.nn.Module, metrics: dict, history: list, /, **more) -> None:
    """Write metrics.json to args.out. data: what load_data returned; history: rows with "seconds" of training."""
    fields = dict(script=script, data=data.name, stand_in=bool(data.stand_in), device=args.device.type, seed=args.seed,
                  seconds=history[-1]["seconds"], parameters=count_parameters(model), metrics=metrics, history=history,
                  versions={"python": sys.version.split()[0], "torch": str(torch.__version__)}) | more
    write_atomically(args.out / "metrics.json", lambda file: file.write(json.dumps(fields, indent=1).encode()))


def pyplot():
    """matplotlib's pyplot, drawing to files (no display is needed) in colours that colour-blind people tell apart."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    plt.style.use(["tableau-colorblind10", {"axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight"}])
    return plt


def plot_history(path: Path, history: list[dict], curves: list[str], title: str, x: str = "step", y: str = "loss"):
    """Draw the named columns of the history rows over x as a PNG; a row that lacks a column is passed over."""
    figure, axes = pyplot().subplots(figsize=(7, 4))
    for name, style in zip(curves, ["-", "--", "-.", ":"] * 2):
        axes.plot(*zip(*[(row[x], row[name]) for row in history if name in row]), style, label=name)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.legend()
    write_atomically(path, figure.savefig)


# ---------------------------------------------- old names, until the last chapter has moved (then deleted)
import argparse
import shutil
import signal
import statistics

import numpy as np

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
plt = pyplot()
_new_parser, _new_load_checkpoint, _new_write, _new_metrics = parser, load_checkpoint, write_atomically, save_metrics


def notice(*lines: str) -> None:
    """Print lines in a box, for what nobody may overlook: above all that a stand-in takes the real data's place."""
    width = max(map(len, lines))
    edge = "+" + "-" * (width + 2) + "+"
    print(edge, *(f"| {line:{width}} |" for line in lines), edge, sep="\n")


def name_or_path(*names: str):
    """A `type` for argparse: one of names stays as it is, a path that exists becomes absolute, to be found again."""
    return lambda text: text if text in names or not Path(text).exists() else str(Path(text).resolve())


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" would say less than the text before it
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def preset(options: argparse.ArgumentParser, name: str, table: dict[str, dict]) -> None:
    """Set the defaults that table has for what the user gave as --name; before --help, which shall show these."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument(f"--{name}", default=options.get_default(name))
    options.set_defaults(**table.get(getattr(first.parse_known_args()[0], name), {}))


def parse(options: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict]:
    """Return every option with its value, and a dict of only those that the user gave."""
    args = options.parse_args()
    given = vars(options.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args)))))
    return args, {name: value for name, value in given.items() if value not in (None, [])}


def check(args: argparse.Namespace, above_zero: str = "", not_negative: str = "", shares: str = "") -> None:
    """Raise InputError for the first of these options (names with spaces between) that is not None and out of range."""
    for names, holds, what in ((above_zero, lambda x: x > 0, "greater than zero"),
                               (not_negative, lambda x: x >= 0, "at least 0"),
                               (shares, lambda x: 0 <= x < 1, "at least 0 and less than 1")):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):  # a nan is in no range
                raise InputError(f"--{name.replace('_', '-')} {value} must be {what}.")


def plain(args: argparse.Namespace) -> dict:
    """Every option as a checkpoint may hold it: a path as a string."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def resume(args: argparse.Namespace, given: dict, script: str, free: tuple[str, ...] = ()) -> dict | None:
    """With --resume: return what checkpoint.pt in --out holds, and set args to the run's options in it. Else None.

    An option given with another value is an InputError. free: options besides --resume, --out, --device and --compile
    that change nothing of what is learned, and so may be another.
    """
    if not args.resume:
        return None
    saved = load_checkpoint(args.out / "checkpoint.pt", script)
    for name, value in saved["options"].items():
        if name not in ("resume", "out", "device", "compile", *free):
            if str(given.get(name, value)) not in (str(value), "auto"):  # auto has become a value by now
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"--resume goes on with a run that had {option} {value}, not {option} {given[name]}; "
                                 "leave the option out, or start anew without --resume.")
            setattr(args, name, value)
    return saved


def catch_signals() -> tuple[list[int], Callable[[], None]]:
    """From here on Ctrl-C and SIGTERM only add to the list returned; the function returned undoes that.

    ## They can come at any moment, also halfway through a step, when weights and optimizer don't match. So a signal
    ## only leaves a note, which a training loop reads where everything fits together.
    """
    caught = []
    handlers = {number: signal.signal(number, lambda number, frame: caught.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    return caught, lambda: [signal.signal(number, handler) for number, handler in handlers.items()]


def set_seed(seed: int) -> None:
    """Seed torch (all devices) and numpy. Raises InputError for what is no seed."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed} must be from 0 to {2**32 - 1}.")
    torch.manual_seed(seed)
    np.random.seed(seed)


def keep_memory() -> None:
    """Ask glibc to keep freed memory instead of handing it back to the system: call it once, before the first tensor.

    ## A training step frees and takes the same hundred megabytes again and again. By default glibc returns large
    ## blocks at once, and the system then has to find and clear fresh pages, a page fault for each 4 KiB.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc (macOS, Windows, musl): nothing to tune
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        if not libc.mallopt(-3, 2**30):  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
            libc.mallopt(-3, 2**25)  # the most that a glibc before 2.35 takes


class Progress:
    """One line that rewrites itself: percent done, text, throughput, ETA. Plain lines, about twenty, when piped."""

    def __init__(self, total: int, unit: str, start: int = 0):
        self.total, self.unit, self.first, self.begun, self.shown = total, unit, start, time.perf_counter(), 0.0
        self.tty, self.width = sys.stdout.isatty(), min(100, shutil.get_terminal_size().columns - 1)

    def update(self, done: int, text: str = "", per: float = 1.0) -> None:
        """done: how many of total; per: how many units of throughput one of them is."""
        now = time.perf_counter()
        share = done / self.total if self.total else 1.0
        if done < self.total and (now - self.shown < 0.1 if self.tty else share - self.shown < 0.05):
            return
        self.shown = now if self.tty else share
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        eta = round((self.total - done) / rate) if rate else 0
        line = f"{share:4.0%}  {text}  {rate * per:,.0f} {self.unit}/s  ETA {eta // 60}:{eta % 60:02}"
        print(f"\r{line[: self.width]:<{self.width}}", end="", flush=True) if self.tty else print(line, flush=True)

    def clear(self) -> None:
        """Make room for an ordinary print."""
        if self.tty:
            print("\r" + " " * self.width + "\r", end="", flush=True)


def go_on(script: str, out: Path) -> str:
    """The command that goes on with a stopped run, to be pasted into a shell."""
    return f"python {script} --resume --out {shlex.quote(str(out))}"


def check_writable(folder: Path) -> None:
    """Raise InputError now, rather than after the training, where results could not be written to folder."""
    probe = Path(folder) / ".probe"
    write_atomically(probe, b"probe")
    probe.unlink(missing_ok=True)


def load_weights(model: torch.nn.Module, saved: dict, path: Path) -> None:
    """Put the weights that the checkpoint `saved`, read from path, holds into model; another model's: InputError."""
    rebuild(lambda: model, saved, path)


def rebuild(build: Callable[[], torch.nn.Module], saved: dict, path: Path) -> torch.nn.Module:
    """The model that build() makes from what `saved`, read from path, says of it, with its weights; else InputError.

    ## A file that another version of the script wrote may lack an option of the model, or name one that is gone.
    """
    try:
        model = build()
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is of another model than {saved['script']} builds; make a new one with: python "
                         f"{saved['script']}") from error
    return model


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG, atomically, and close it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def parser(doc, script=None, *common):
    return _new_parser(doc, script, *common) if script else argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=_Help)


def write_atomically(path, data, *content):
    _new_write(Path(path), (lambda file: file.write(data)) if isinstance(data, bytes) else data, *content)


def save_checkpoint(path, state):
    write_atomically(path, torch.save, state)


def pick_device(name="auto"):
    args = argparse.Namespace(device=name, out=Path("/tmp"))
    return parse_args(argparse.Namespace(parse_args=lambda: args)).device


def load_checkpoint(path, script, device=None, options={}):
    state = _new_load_checkpoint(Path(path), script, device if isinstance(device, dict) else options)
    if device is None or isinstance(device, dict) or str(device) == "cpu":
        return state
    return torch.load(path, map_location=device, weights_only=True)


def save_metrics(args, *rest, **fields):
    if not isinstance(args, Path):
        return _new_metrics(args, *rest, **fields)
    versions = {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}
    write_atomically(args, json.dumps({**fields, "versions": versions}, indent=1).encode())
