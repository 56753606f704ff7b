"""The few helpers that all six chapters share. To take a chapter into your own project, copy its folder and this."""
import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import shlex
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

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
    if "RANK" in os.environ:  # torchrun started several processes: they find each other, and only the first prints
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if torch.cuda.is_available() else -1)  # -1: none
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)  # a process that ends without this may abort
        sys.stdout = open(os.devnull, "w") if dist.get_rank() else sys.stdout
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
    write_atomically(probe := (args.out.parent if args.out.suffix else args.out) / ".probe", lambda file: None)
    probe.unlink(missing_ok=True)  # fails now and not after the training; --out may name a file
    return args


def pick_dtype(device: torch.device) -> torch.dtype:
    """The one of bfloat16 and float32 in which this device multiplies matrices faster: what --dtype auto means."""
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    ## CPUs with AMX or AVX512-BF16 are several times faster in bfloat16, others slower. The two take turns here.
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for dtype in list(seconds) * 20:
        x, w = torch.ones(1024, 256, dtype=dtype), torch.ones(768, 256, dtype=dtype)
        seconds[dtype] = min(seconds[dtype], timeit.timeit(lambda: torch.nn.functional.linear(x, w), number=1))
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
