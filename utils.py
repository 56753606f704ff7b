"""The few helpers that all six chapters share: errors, options, signals, device, seed, download, checkpoints, plots.

Nothing here knows about any chapter, and no training loop lives here: those are lessons and stay in the chapters.
To take a chapter into a project of your own, copy its folder and this file.
"""
import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
import timeit
import zipfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import requests
import torch
import torch.nn.functional as F

matplotlib.use("Agg")  # plots go to files: works on machines without a display
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

DATA_DIR = Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parent / "data"))
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe-Ito: colour-blind-safe
plt.rcParams.update({"axes.prop_cycle": plt.cycler(color=COLORS), "axes.grid": True, "grid.alpha": 0.3,
                     "figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "savefig.bbox": "tight"})


# ---------------------------------------------------------------------------------------------- errors
class InputError(ValueError):
    """Something the user can put right. Its message is one sentence that names the thing and what to do."""


def run(main) -> None:
    """Call main(). What a user can cause ends in one sentence and a non-zero exit status; a bug keeps its traceback."""
    with contextlib.suppress(AttributeError):  # what a terminal can't show becomes a code, and no error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\nstopped. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)  # what a shell reports for Ctrl-C
    except BrokenPipeError:  # the reader went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except InputError as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        ## A GPU's allocator has an error of its own; a CPU's only a sentence, in which it names itself.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        sys.exit("error: the device ran out of memory; try a smaller --batch-size, or what else --help says of memory.")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror or error}; check that the path is right and "
                 "writable, and that the disk has free space.")


def notice(*lines: str) -> None:
    """Print lines in a box, for what nobody may overlook: above all that a stand-in takes the real data's place."""
    width = max(map(len, lines))
    edge = "+" + "-" * (width + 2) + "+"
    print(edge, *(f"| {line:{width}} |" for line in lines), edge, sep="\n")


# ---------------------------------------------------------------------------------------------- options
def name_or_path(*names: str):
    """A `type` for argparse: one of names stays as it is, a path that exists becomes absolute, to be found again."""
    return lambda text: text if text in names or not Path(text).exists() else str(Path(text).resolve())


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" would say less than the text before it
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help starts with the first line of doc, a script's docstring, and names the default values."""
    return argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=_Help)


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


# ---------------------------------------------------------------------------------------------- signals
def catch_signals() -> tuple[list[int], Callable[[], None]]:
    """From here on Ctrl-C and SIGTERM only add to the list returned; the function returned undoes that.

    ## They can come at any moment, also halfway through a step, when weights and optimizer don't match. So a signal
    ## only leaves a note, which a training loop reads where everything fits together.
    """
    caught = []
    handlers = {number: signal.signal(number, lambda number, frame: caught.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    return caught, lambda: [signal.signal(number, handler) for number, handler in handlers.items()]


# ---------------------------------------------------------------------------------------------- device, seed, memory
def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes the best device there is; a named one that is missing is an InputError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not available.get(kind, False) or index and not (index.isdigit() and int(index) < count):
        raise InputError(f"--device {name}: this machine has no such device; use --device auto.")
    return torch.device(name)


def pick_dtype(device: torch.device) -> torch.dtype:
    """The faster of bfloat16 and float32 for matrix products on this device: a GPU by asking it, a CPU by timing it.

    ## A CPU with AMX or AVX512-BF16 multiplies bfloat16 matrices several times faster than float32 ones; one without
    ## them may be slower in bfloat16. Nothing tells the two apart as surely as a few milliseconds of trying. The two
    ## take turns, and the fastest of each counts: another program may be busy for a while.
    """
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in list(seconds) * 20:
        x, w = torch.ones(1024, 256, dtype=dtype), torch.ones(768, 256, dtype=dtype)
        seconds[dtype] = min(seconds[dtype], timeit.timeit(lambda: F.linear(x, w), number=1))
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


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


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trainable parameters; a tensor that two modules share counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------- progress, download
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


def download(urls: list[str], path: Path, sha256: str, timeout: tuple[float, float] = (10, 30)) -> Path:
    """Fetch a file from the first mirror that has it; resume what is there; verify; only then give it its name.

    timeout: seconds to connect, seconds of silence. Raises ConnectionError where no mirror could be reached, and
    InputError where a file came, or was there before, whose hash is wrong: such a file is never used or replaced.
    sha256: the expected hash in hexadecimal; where its 32 digits show an md5, that is what is compared.
    """
    path = Path(path)
    if path.exists():
        if _hash(path, sha256) != sha256:
            raise InputError(f"{path} is not the expected file (its hash differs); delete it to download it again.")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failures, wrong = path.with_name(path.name + ".part"), [], None
    size = lambda: part.stat().st_size if part.exists() else 0  # noqa: E731
    for url in urls:
        tries = 3  # without progress: a connection that is cut after moving some bytes may go on as often as it likes
        while tries:
            before, status = size(), None
            try:
                _fetch(url, part, timeout)
            except requests.RequestException as error:
                status = getattr(error.response, "status_code", None)
                failures.append(f"{url}: {f'HTTP {status}' if status else type(error).__name__}")
                tries = 3 if size() > before else 0 if status and status != 416 and status < 500 else tries - 1
                time.sleep(0.2)
                if status != 416:  # else what we have is as long as the file, or longer
                    continue
            try:
                if _hash(part, sha256) == sha256:
                    os.replace(part, path)
                    return path
                part.unlink()
            except FileNotFoundError:  # another process wrote the same part, and was the first to see that it is whole
                return download(urls, path, sha256, timeout)
            wrong = wrong if status == 416 else url
            tries = 1 if before else 0  # a file pieced together gets a second chance from zero
    if wrong:
        raise InputError(f"{wrong} sent a file with the wrong hash for {path.name}; nothing was kept, so try again "
                         f"later or put the right file at {path} yourself.")
    raise ConnectionError(f"{path.name} could not be downloaded ({'; '.join(dict.fromkeys(failures))}); its place, if "
                          f"you fetch it elsewhere, is {path}.")


def _fetch(url: str, part: Path, timeout: tuple[float, float]) -> None:
    have = part.stat().st_size if part.exists() else 0
    ## Compressed on the way, a file would have another length and could not be resumed at a byte of ours.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as reply:
        reply.raise_for_status()
        if reply.status_code != 206:
            have = 0  # the server ignored Range and sends the whole file
        length = int(reply.headers.get("Content-Length", 0))
        bar = Progress(have + length, "MB", have)
        part.touch()
        ## Two processes may fetch the same file at once. Both write the same bytes to the same places, so neither may
        ## append to what the other has written, nor cut it off.
        with open(part, "r+b") as file:
            file.seek(have)
            for block in reply.iter_content(1 << 16):
                file.write(block)
                have += len(block)
                if length:  # else nobody said how much is to come
                    bar.update(have, part.stem, per=1e-6)
    bar.clear()
    if length and have < bar.total:  # requests does not always notice that the other side hung up early
        raise requests.ConnectionError(f"connection cut after {have} of {bar.total} bytes")


def _hash(path: Path, expected: str) -> str:
    digest = hashlib.md5() if len(expected) == 32 else hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- files
def write_atomically(path: Path, data) -> None:
    """Whatever happens, and whenever, `path` holds the old bytes or the new ones: write beside it, flush, rename.

    data: bytes, or a function that writes them to the open file it is given.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # its own, should two processes write at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data) if isinstance(data, bytes) else data(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only in the system's cache, before the name moves
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save buries it
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path} ({cause.strerror}); free some space or choose another --out.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # still there only where something failed
        with contextlib.suppress(OSError):
            for left in path.parent.glob(f"{path.name}.*.tmp"):  # by a process that was killed
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()


def go_on(script: str, out: Path) -> str:
    """The command that goes on with a stopped run, to be pasted into a shell."""
    return f"python {script} --resume --out {shlex.quote(str(out))}"


def check_writable(folder: Path) -> None:
    """Raise InputError now, rather than after the training, where results could not be written to folder."""
    probe = Path(folder) / ".probe"
    write_atomically(probe, b"probe")
    probe.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a dict of tensors and plain Python values (nothing else, so that it loads with weights_only=True)."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, script: str, device: torch.device | str = "cpu") -> dict:
    """Read what save_checkpoint wrote in `script`; anything else is an InputError, and no code in it is run."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; make it with: python {script}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a checkpoint, or was cut short; make a new one with: python {script}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        what = "carries code, which is never run" if "weights_only" in str(error) else "is damaged"
        raise InputError(f"{path} {what}; use a file that you made with: python {script}") from error
    if not isinstance(state, dict) or state.get("script") != script:
        origin = state.get("script", "another program") if isinstance(state, dict) else "another program"
        raise InputError(f"{path} was written by {origin}; this needs one from: python {script}")
    return state


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


def save_metrics(path: Path, **fields) -> None:
    """Write metrics.json; `versions` is added here. Fields: script, data, stand_in, device, seed, seconds, ..."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    write_atomically(path, json.dumps({**fields, "versions": versions}, indent=1).encode())


# ---------------------------------------------------------------------------------------------- figures
def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plot_history(path: Path, history: list[dict], curves: list[str], title: str, x: str = "step", y: str = "loss"):
    """Draw the named columns of the history rows over x as a PNG; a row that lacks a column is passed over."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, style in zip(curves, ["-", "--", "-.", ":"] * 2):
        rows = [row for row in history if name in row]
        axes.plot([row[x] for row in rows], [row[name] for row in rows], style, label=name)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no epoch 1.5
    axes.legend()
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG, atomically, and close it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)
