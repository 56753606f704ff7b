"""Side by side with the usual way: ours, the peer's and the ratio, from one run on one machine.

    python tests/benchmark.py                 all rows (half an hour on two cores, `pictures` a third of it)
    python tests/benchmark.py --rows training generation

The two sides take turns (A B A B ...), so that a machine that slows down slows both; figures are medians. The peers
are used as their documentation shows. pytest does not collect this file: timings are no pass or fail.
"""

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import ROOT, chapter
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import utils

load, train, load_model = chapter("05_transformer", "load", "train", "load_model")


def alternate(ours, peer, rounds: int) -> tuple[float, float]:
    """Median of what each of two functions returns over some rounds, after one round that does not count."""
    ours(), peer()
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return tuple(statistics.median(side) for side in zip(*pairs))


def gpt2_peer(
    vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float = 0.0
) -> torch.nn.Module:
    """transformers' GPT-2 with random weights, of the given size."""
    from transformers import GPT2Config, GPT2LMHeadModel  # here: its memory is no part of ours in the row `lora`

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=block_size,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def default_model() -> tuple[torch.nn.Module, dict]:
    """Our GPT with the sizes of the default preset, in the precision that train.py would choose here."""
    preset = train.PRESETS["small"]
    config = dict(vocab_size=65, **{k: preset[k] for k in ("block_size", "n_layer", "n_head", "n_embd", "dropout")})
    return train.GPT(**config), config


def training() -> None:
    """Characters per second of whole training steps: forward, backward, clipping, optimizer."""
    preset = train.PRESETS["small"]
    B, T = preset["batch_size"], preset["block_size"]
    model, config = default_model()
    model.dtype = utils.pick_dtype(torch.device("cpu"))
    optimizers = train.make_optimizers(model, 2e-3, 0.02, 0.1)
    peer = gpt2_peer(**config).train()
    peer_optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3)
    x, y = torch.randint(65, (2, B, T))

    def step(loss_of, module, opts):
        start = time.perf_counter()
        for _ in range(10):
            loss_of().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for o in opts:
                o.step()
                o.zero_grad()
        return 10 * B * T / (time.perf_counter() - start)

    ours, theirs = alternate(
        lambda: step(lambda: model(x, y), model, optimizers),
        lambda: step(lambda: F.cross_entropy(peer(x).logits.flatten(0, 1), y.flatten()), peer, [peer_optimizer]),
        9,
    )
    row(
        "05 training, characters/s",
        ours,
        theirs,
        f"GPT2LMHeadModel, eager float32, AdamW, same size and batch ({model.dtype} here)",
    )


def attention() -> None:
    """Milliseconds of attention forward and backward, spelled out as in 05 and 06, and by PyTorch's fused kernel."""
    dtype = utils.pick_dtype(torch.device("cpu"))
    preset = train.PRESETS["small"]
    small = preset["batch_size"], preset["n_head"], preset["block_size"], preset["n_embd"] // preset["n_head"]
    for name, shape in (("05", small), ("06", (4, 12, 256, 64))):  # (B, H, T, D)
        q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))

        def once(f):
            start = time.perf_counter()
            f(q, k, v).sum().backward()
            return 1e3 * (time.perf_counter() - start)

        ours, peer = alternate(lambda: once(lambda *qkv: train.attend(*qkv)[0]),
                               lambda: once(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)), 15)
        row(f"{name} attention, ms", ours, peer, f"scaled_dot_product_attention, {dtype}, {shape}", lower=True)


def generation() -> None:
    """Characters per second of one sequence, sampled at temperature 1, with a cache on both sides."""
    model, config = default_model()
    model.eval()
    peer = gpt2_peer(**config).eval()
    for weight in (model.head.weight, peer.lm_head.weight):
        torch.nn.init.normal_(weight, std=0.02)
    length = config["block_size"] - 8
    ids = torch.randint(65, (1, 4))

    def ours_once():
        start = time.perf_counter()
        for _ in load_model.generate(model, ids, length):
            pass
        return length / (time.perf_counter() - start)

    def peer_once():
        start = time.perf_counter()
        with torch.no_grad():
            out = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                use_cache=True,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            )
        assert out.shape[1] == length + 4
        return length / (time.perf_counter() - start)

    threads = torch.get_num_threads()
    for n in sorted({1, threads}):  # the peer may like more threads than we do: its better setting counts
        torch.set_num_threads(n)
        ours, theirs = alternate(ours_once, peer_once, 7)
        row(
            f"05 generation, characters/s, {n} thread{'s' * (n > 1)}",
            ours,
            theirs,
            "transformers' generate with cache, same size",
        )
    torch.set_num_threads(threads)


def time_to_loss(goal: float = 1.886) -> None:
    """Seconds of training until the whole-validation loss is below nanoGPT's CPU figure; ours as a user runs it.

    nanoGPT's README names 1.88 for its CPU recipe.
    """
    data = load.load_data(None, 128)
    if data.stand_in:
        print("05 time to loss: left out, Tiny Shakespeare is not at hand")
        return
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / "05_transformer" / "train.py", "--steps", "300", "--eval-every", "20"]
        subprocess.run([*command, "--out", out], check=True, stdout=subprocess.DEVNULL)
        history = json.loads((Path(out) / "metrics.json").read_text())["history"]
    seconds = next((r["seconds"] for r in history if r["val_loss"] <= goal), math.nan)
    peer_seconds, peer_loss = nanogpt_recipe(data, goal)
    note = f"train.py --steps 300 against nanoGPT's CPU recipe, stopped at {peer_loss:.3f}"
    row(f"05 seconds of training to {goal}", seconds, peer_seconds, note, lower=True)


def nanogpt_recipe(data, goal: float) -> tuple[float, float]:
    """Train transformers' GPT-2 by the recipe in nanoGPT's README for a CPU: 4 layers, 4 heads, width 128, context 64,
    batch 12, 2,000 steps of AdamW, 1e-3 falling to 1e-4 as a cosine after 100 steps of warm-up, no dropout, float32.
    Returns seconds of training and loss when the goal was reached, or at the end where it never was."""
    torch.manual_seed(1337)
    model = gpt2_peer(65, 64, 4, 4, 128)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.99)
    )
    stream = load.batches(data.train, 64, 12, seed=1337)
    seconds = 0.0
    begun = time.perf_counter()
    for step, (x, y) in zip(range(2000), stream):
        share = max(0.0, (step - 100) / 1900)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 100 if step < 100 else 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * share))
        F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 and step >= 1000:  # the clock stands still while we look
            seconds += time.perf_counter() - begun
            model.eval()
            with torch.no_grad():
                n = (len(data.val) - 1) // 64 * 64
                pieces = zip(data.val[:n].view(-1, 64).split(128), data.val[1 : n + 1].view(-1, 64).split(128))
                loss = (
                    sum(
                        F.cross_entropy(model(a).logits.flatten(0, 1), b.flatten()).item() * a.numel()
                        for a, b in pieces
                    )
                    / n
                )
            model.train()
            if loss <= goal:
                break
            begun = time.perf_counter()
    return seconds, loss


def epoch() -> None:
    """Seconds of one epoch of chapter 01: the same model, batch and optimizer; shuffling and loading included."""
    mlp_load, mlp_train = chapter("01_basics", "load", "train")
    x, y = mlp_load.typeset(55_000, "train", 0)
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.13, 0.31)])
    normal = mlp_load.normalise(x, 0.13, 0.31).flatten(1)

    def once(batches, module, optimizer):
        start = time.perf_counter()
        for a, b in batches:
            optimizer.zero_grad()
            F.cross_entropy(module(a.flatten(1)), b).backward()
            optimizer.step()
        return time.perf_counter() - start

    model, peer = mlp_train.SimpleNN(), mlp_train.SimpleNN()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    peer_optimizer = torch.optim.AdamW(peer.parameters())
    # The class that the usual loop reads MNIST with, holding our pictures: __init__ would look for files.
    usual_set = datasets.MNIST.__new__(datasets.MNIST)
    usual_set.data, usual_set.targets, usual_set.transform, usual_set.target_transform = x, y, usual, None
    for workers in (0, 2):
        loader = DataLoader(usual_set, 64, shuffle=True, num_workers=workers)
        ours, theirs = alternate(
            lambda: once(mlp_train.batches(normal, y, 64, 0), model, optimizer),
            lambda loader=loader: once(loader, peer, peer_optimizer),
            3,
        )
        note = f"same model and batch 64; torchvision's MNIST, DataLoader, {workers} workers, ToTensor, Normalize"
        row("01 seconds of one epoch", ours, theirs, note, lower=True)


class Pictures(torch.utils.data.Dataset):
    """Pictures one by one with transforms, as torchvision.datasets.CIFAR10 gives them: from memory, through Pillow."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, transform):
        self.x, self.y, self.transform = x.permute(0, 2, 3, 1).numpy(), y.tolist(), transform

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.x[i].squeeze())), self.y[i]


def pictures() -> None:
    """Pictures per second of whole training steps of chapter 02's two networks, loading and augmentation included."""
    cnn_load, cnn_train = chapter("02_cnn", "load", "train")
    x, y = cnn_load.draw_shapes(10_000, 0)
    mean, std = cnn_load.channel_statistics(x)
    dtype = utils.pick_dtype(torch.device("cpu"))
    usual = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    for name in ("simple", "resnet"):
        preset = cnn_train.PRESETS[name]
        B = preset["batch_size"]
        steps = 8_000 // B
        config = {"model": name, "classes": 10, "head_only": False, "dropout": 0.2}
        model = cnn_train.build(config, mean, std).to(memory_format=torch.channels_last).train()
        optimizers = cnn_train.make_optimizers(model, preset["lr"], preset["muon_lr"], preset["batch_size"])
        peer = cnn_train.build(config, mean, std).train()
        first = {"simple": "0", "resnet": "normalise"}[name]
        setattr(peer, first, torch.nn.Identity())  # its loader normalises
        peer_optimizer = torch.optim.SGD(peer.parameters(), lr=0.01, momentum=0.9, nesterov=True)

        convs = [layer for layer in model.modules() if isinstance(layer, cnn_train.Conv)]

        def ours_once(model=model, optimizers=optimizers, convs=convs, preset=preset, B=B, steps=steps):
            start = time.perf_counter()
            for rows in torch.randperm(len(y)).split(B)[:steps]:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    logits = model(cnn_load.augment(x[rows], preset["pad"], preset["cutout"])).float()
                F.cross_entropy(logits, y[rows], label_smoothing=0.1).backward()
                cnn_train.set_rates(optimizers, 0.5)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                for conv in convs:
                    conv.rescale()
            return steps * B / (time.perf_counter() - start)

        def peer_once(workers, peer=peer, optimizer=peer_optimizer, B=B, steps=steps):
            loader = DataLoader(Pictures(x, y, usual), B, shuffle=True, num_workers=workers)
            batches = iter(loader)
            inputs, labels = next(batches)  # the workers' start does not count
            start = time.perf_counter()
            for _ in range(steps):
                F.cross_entropy(peer(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                inputs, labels = next(batches)
            return steps * B / (time.perf_counter() - start)

        for workers in (0, 2):  # worker processes help where cores are idle: the peer's better setting counts
            ours, theirs = alternate(ours_once, functools.partial(peer_once, workers), 5)
            note = f"same network and batch; DataLoader, {workers} workers, transforms, eager float32 ({dtype} here)"
            row(f"02 {name} training, pictures/s", ours, theirs, note)


class Windows(torch.utils.data.Dataset):
    """Windows one by one, cut from the series as the published forecasting code does."""

    def __init__(self, series: torch.Tensor, lookback: int, horizon: int):
        self.series, self.lookback, self.horizon = series.numpy(), lookback, horizon

    def __len__(self) -> int:
        return len(self.series) - self.lookback - self.horizon + 1

    def __getitem__(self, i: int):
        middle = i + self.lookback
        return self.series[i:middle], self.series[middle : middle + self.horizon]


class UsualSegRNN(torch.nn.Module):
    """SegRNN as its authors build it: nn.GRU for both halves, the state and the places repeated for each other."""

    def __init__(self, channels: int, horizon: int, segment: int, hidden: int, dropout: float):
        super().__init__()
        self.segment, self.Q = segment, horizon // segment
        self.embed = torch.nn.Sequential(torch.nn.Linear(segment, hidden), torch.nn.ReLU())
        self.rnn = torch.nn.GRU(hidden, hidden, batch_first=True)
        self.place = torch.nn.Parameter(torch.randn(self.Q, hidden // 2))
        self.channel = torch.nn.Parameter(torch.randn(channels, hidden // 2))
        self.out = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(hidden, segment))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        level, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0) + 1e-3
        z = ((x - level) / spread).permute(0, 2, 1).reshape(B * C, -1, self.segment)
        _, h = self.rnn(self.embed(z))  # (1, B C, M)
        asked = torch.cat([self.place.repeat(C, 1), self.channel.repeat_interleave(self.Q, 0)], 1)  # (C Q, M)
        h = h.repeat_interleave(self.Q, 1)  # (1, B C Q, M)
        _, h = self.rnn(asked.repeat(B, 1)[:, None], h)
        y = self.out(h[0]).view(B, C, -1).permute(0, 2, 1)  # (B, P, C)
        return y * spread + level


def forecasting(horizon: int = 96, steps: int = 40) -> None:
    """Windows per second in training of chapter 03's default net, on a stand-in of ETTh1's size."""
    lstm_load, lstm_train = chapter("03_lstm", "load", "train")
    recipe = lstm_train.MODELS["segment"]
    T, batch = recipe["lookback"], recipe["batch_size"]
    data = lstm_load.load_data("station", T, horizon)
    inputs, targets = lstm_load.windows(data.train, T, horizon)
    C, shape = inputs.shape[2], {name: recipe[name] for name in ("segment", "hidden", "dropout")}
    config = dict(channels=C, horizon=horizon, lookback=T, norms=recipe["norm"], line="none")
    model = lstm_train.build("segment", config | shape)
    lstm_train.set_dtype(model, utils.pick_dtype(torch.device("cpu")))
    peer = UsualSegRNN(C, horizon, **shape)

    def once(batches, module, optimizer):
        start = time.perf_counter()
        for _, (x, y) in zip(range(steps), batches):
            optimizer.zero_grad()
            (module(x) - y).abs().mean().backward()
            optimizer.step()
        return steps * batch / (time.perf_counter() - start)

    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Windows(data.train, T, horizon), batch, shuffle=True)
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True), torch.optim.AdamW(peer.parameters())]
    ours, theirs = alternate(lambda: once(((inputs[rows], targets[rows]) for rows in lstm_train.batches(
        len(inputs), batch, generator)), model, optimizers[0]),
                             lambda: once(loader, peer, optimizers[1]), 7)
    row("03 windows per second in training", ours, theirs, f"the same net and batch {batch}; nn.GRU twice, DataLoader, "
        "float32")


def gpt2_folder(folder: Path) -> None:
    """Random weights of GPT-2's 124 M shape, and an adapter of rank 8 for c_attn, in the files of hub and PEFT."""
    gpt2, lora, peft_files = chapter("06_finetune", "gpt2", "lora", "peft_files")
    torch.manual_seed(0)
    model = gpt2.GPT2(gpt2.SIZES["gpt2"])
    gpt2.save_model(model, folder, end=50256)
    lora.add_lora(model, 8, 16, 0.0, ["c_attn"])
    peft_files.save_adapter(model, folder / "adapter", str(folder))


def lora_side(side: str, folder: Path, steps: int = 6) -> None:
    """One side of the row `lora`, in a process of its own, for memory is counted by the process. Prints JSON."""
    utils.run(lambda: None) if side == "ours" else None  # it keeps freed memory
    B, T = 4, 256
    gpt2, peft_files, memory = chapter("06_finetune", "gpt2", "peft_files", "memory")
    dtype = utils.pick_dtype(torch.device("cpu")) if side == "ours" else torch.float32
    if side == "ours":
        model = gpt2.read_model(folder, gpt2.read_config(folder / "config.json"))
        peft_files.load_adapter(model, folder / "adapter")
        if dtype == torch.bfloat16:
            gpt2.shrink(model)
        model.train()
        options = {"fused": True}
    else:
        import peft
        from transformers import GPT2LMHeadModel

        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel.from_pretrained(folder, **none)
        model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).train()
        options = {}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, **options)
    text = torch.randint(50257, (steps, B, T + 1), generator=torch.Generator().manual_seed(0))
    seconds, losses = [], []
    for window in text:
        start = time.perf_counter()
        if side == "ours":
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(window[:, :-1], targets=window[:, 1:])
        else:
            loss = model(input_ids=window, labels=window).loss  # shifts the labels itself: the same 4 x 256 targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "memory": memory.peak_memory(torch.device("cpu")),
                      "losses": losses, "trained": sum(p.numel() for p in trained), "dtype": str(dtype)}))


def lora() -> None:
    """A training step of LoRA (r = 8, c_attn) on GPT-2's 124 M shape, batch 4 x 256: seconds, peak memory, losses."""
    with tempfile.TemporaryDirectory() as folder:
        gpt2_folder(Path(folder))
        runs = {"ours": [], "peer": []}
        for side in ["ours", "peer"] * 3:
            command = [sys.executable, __file__, "--side", side, "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    seconds, memory = ([statistics.median(run[key] for run in side) for side in runs.values()]
                       for key in ("seconds", "memory"))
    ours, peer = runs["ours"][0], runs["peer"][0]
    note = f"transformers + peft, float32 ({ours['dtype']} here); {ours['trained']:,} and {peer['trained']:,} trained"
    row("06 seconds per LoRA step, 124 M", *seconds, note, lower=True)
    difference = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"]))
    note = f"same runs; losses differ by up to {difference:.4f} of {peer['losses'][0]:.2f}, {len(peer['losses'])} steps"
    row("06 peak memory of LoRA, GB", memory[0] / 1e9, memory[1] / 1e9, note, lower=True)


def gpt2_generation(length: int = 256) -> None:
    """Tokens per second, greedy, from GPT-2's 124 M shape with random weights, cache on both sides."""
    from transformers import GPT2LMHeadModel

    gpt2 = chapter("06_finetune", "gpt2")
    dtype = utils.pick_dtype(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        gpt2_folder(Path(folder))
        peer = GPT2LMHeadModel.from_pretrained(folder).eval()
        model = gpt2.read_model(Path(folder), gpt2.SIZES["gpt2"]).requires_grad_(False)
        if dtype == torch.bfloat16:
            gpt2.shrink(model)
        ids = torch.randint(50257, (8,), generator=torch.Generator().manual_seed(0)).tolist()

        def ours_once():
            start = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                n = len(list(gpt2.generate(model, ids, length, temperature=0)))
            assert n == length
            return length / (time.perf_counter() - start)

        def peer_once():
            start, prompt = time.perf_counter(), torch.tensor([ids])
            with torch.no_grad():
                out = peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                                    min_new_tokens=length, max_new_tokens=length, pad_token_id=0)
            assert out.shape[1] == length + len(ids)
            return length / (time.perf_counter() - start)

        ours, theirs = alternate(ours_once, peer_once, 3)
    row("06 generation, 124 M, tokens/s", ours, theirs, f"transformers' generate with cache, float32 ({dtype} here)")


def boosting(seeds: int = 3) -> None:
    """UCI Adult: train.py of chapter 04 by default, and boosted trees with default settings on the same rows."""
    import own_tables

    if not (utils.DATA_DIR / "adult.data").exists():
        print("04 boosting: left out, UCI Adult is not at hand")
        return
    runs = {}  # of each side: accuracy and AUC in %, seconds of training
    with tempfile.TemporaryDirectory() as out:
        for seed in range(seeds):
            written, _ = own_tables.ours(seed, Path(out), "--data", "adult")
            figures = {name: written["metrics"][f"test_{name}"] for name in ("accuracy", "auc")}
            sides = {"ours": figures | {"seconds": written["seconds"]}} | own_tables.peers("adult", None, seed)
            for side, figures in sides.items():
                runs.setdefault(side, []).append((100 * figures["accuracy"], 100 * figures["auc"], figures["seconds"]))
    for peer in set(runs) - {"ours"}:
        for i, name in enumerate(("test accuracy, %", "test AUC, %", "seconds of training")):
            mine, other = (statistics.mean(run[i] for run in runs[side]) for side in ("ours", peer))
            row(f"04 {name}", mine, other, f"{peer}, defaults, same rows; mean of {seeds} seeds", lower=i == 2)


def tables() -> None:
    """A folder of tables of one's own, beside the linear model and boosted trees: tests/own_tables.py."""
    import own_tables

    if args.own is None:
        print("04 tables: left out, --own names no folder with a tables.json (see tests/own_tables.py)")
    else:
        own_tables.compare(args.own)


def bert_folder(folder: Path, method: str) -> str:
    """MiniLM with a new head and an adapter, in the files of hub and PEFT; or, where MiniLM's weights are not at hand,
    random ones of its shape. Returns which of the two. The adapter is the usual one, rank 8 for query and value, or
    with method "lora-all" bert_classify.py's default, rank 16 for all matrices of a block."""
    bert, lora, classify, bert_train, peft_files = chapter("06_finetune", "bert", "lora", "bert_classify", "bert_train",
                                                           "peft_files")
    torch.manual_seed(0)
    here = utils.DATA_DIR / "minilm"
    options = {"labels": ["negative", "positive"], "pooling": "cls"}
    if here.exists():
        model = bert.open_bert(here, "minilm", bert.Classifier, **options)[0]
    else:
        model = bert.Classifier(bert.SIZES["minilm"] | options)
    bert.save_model(model, folder)
    rank, targets = (16, classify.ALL_MATRICES["bert"]) if method == "lora-all" else (8, ["query", "value"])
    lora.add_lora(model, rank, 16, 0.0, targets)
    peft_files.save_adapter(model, folder / "adapter", str(folder), "", "SEQ_CLS", bert_train.heads(model))
    return "MiniLM" if here.exists() else "random weights of MiniLM's shape"


def bert_side(side: str, folder: Path, method: str, steps: int = 8) -> None:
    """One side of the row `bert`, in a process of its own, for memory is counted by the process. Prints JSON."""
    utils.run(lambda: None) if side == "ours" else None  # it keeps freed memory
    bert, bert_train, peft_files, memory = chapter("06_finetune", "bert", "bert_train", "peft_files", "memory")
    dtype = utils.pick_dtype(torch.device("cpu")) if side == "ours" else torch.float32
    if side == "ours":
        config = bert.read_config(folder / "config.json") | {"dropout": 0.0}
        model = bert.read_model(folder, config, bert.Classifier).train()
        if method != "full":
            peft_files.load_adapter(model, folder / "adapter", "")
            bert_train.shrink(model, dtype)
        options = {"fused": True}
    else:
        import peft
        from transformers import AutoModelForSequenceClassification

        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = AutoModelForSequenceClassification.from_pretrained(folder, **none).train()
        if method != "full":
            model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).train()
        options = {}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, **options)
    generator = torch.Generator().manual_seed(0)
    seconds, losses = [], []
    for _ in range(steps):
        ids = torch.randint(1000, 30000, (32, 128), generator=generator)  # reviews as long as the script reads them
        mask = torch.arange(128) < torch.randint(100, 129, (32, 1), generator=generator)
        y = torch.randint(2, (32,), generator=generator)
        start = time.perf_counter()
        if side == "ours":
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(ids, mask)
            loss = F.cross_entropy(logits, y)
        else:
            loss = model(input_ids=ids, attention_mask=mask.long(), labels=y).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(seconds[2:]), "memory": memory.peak_memory(torch.device("cpu")),
                      "losses": losses, "trained": sum(p.numel() for p in trained), "dtype": str(dtype)}))


def bert() -> None:
    """A training step of MiniLM as a classifier, batch 32 x 128, whole, by LoRA: seconds, peak memory, losses."""
    for method in ("full", "lora", "lora-all"):
        with tempfile.TemporaryDirectory() as folder:
            what = bert_folder(Path(folder), method)
            runs = {"ours": [], "peer": []}
            for side in ["ours", "peer"] * 3:
                command = [sys.executable, __file__, "--side", side, "--folder", folder, "--job", f"bert-{method}"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
        seconds, memory = ([statistics.median(run[key] for run in side) for side in runs.values()]
                           for key in ("seconds", "memory"))
        ours, peer = runs["ours"][0], runs["peer"][0]
        note = (f"transformers{' + peft' * (method != 'full')}, float32 ({ours['dtype']} here), {what}; "
                f"{ours['trained']:,} and {peer['trained']:,} trained")
        row(f"06 seconds per step of BERT, {method}", *seconds, note, lower=True)
        difference = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"]))
        note = f"same runs; losses differ by up to {difference:.4f} of {peer['losses'][0]:.2f}"
        row(f"06 peak memory of BERT, {method}, GB", memory[0] / 1e9, memory[1] / 1e9, note, lower=True)


def wordpiece() -> None:
    """Texts per second, all of SST-2 from text to ids; a new tokenizer each time, as ours remembers words."""
    from transformers import BertTokenizerFast

    module, classify = chapter("06_finetune", "wordpiece", "bert_classify")
    path = utils.DATA_DIR / "minilm" / "vocab.txt"
    if not path.exists() or not (utils.DATA_DIR / "sst2").exists():
        print("06 wordpiece: left out, MiniLM's vocabulary or SST-2 is not at hand")
        return
    texts = [text for part in classify.load_data("sst2")[:3] for text in part.texts]
    found = {}

    def once(side):
        tokenizer = module.WordPiece.load(path) if side == "ours" else BertTokenizerFast(str(path))
        start = time.perf_counter()
        if side == "ours":
            found[side] = [tokenizer.encode(text).ids for text in texts]
        else:
            found[side] = tokenizer(texts)["input_ids"]
        return len(texts) / (time.perf_counter() - start)

    ours, theirs = alternate(lambda: once("ours"), lambda: once("peer"), 5)
    same = sum(a == b for a, b in zip(found["ours"], found["peer"], strict=True))
    note = f"transformers' fast tokenizer, in Rust; {same:,} of {len(texts):,} equal"
    row("06 WordPiece, texts/s", ours, theirs, note)


def row(name: str, ours: float, peer: float, note: str, lower: bool = False) -> None:
    ratio = peer / ours if lower else ours / peer
    print(f"{name:40} ours {ours:10,.3f}   peer {peer:10,.3f}   {ratio:6.3f} x   {note}", flush=True)


ROWS = {
    "epoch": epoch,
    "pictures": pictures,
    "forecasting": forecasting,
    "training": training,
    "attention": attention,
    "generation": generation,
    "time_to_loss": time_to_loss,
    "boosting": boosting,
    "tables": tables,
    "lora": lora,
    "gpt2_generation": gpt2_generation,
    "bert": bert,
    "wordpiece": wordpiece,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--own", type=Path, help="a folder of tables, for the row `tables`")
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)  # lora starts this script anew
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", default="lora", help=argparse.SUPPRESS)  # what the new script does
    args = parser.parse_args()
    if args.side:
        if args.job == "lora":
            lora_side(args.side, args.folder)
        else:
            bert_side(args.side, args.folder, args.job.removeprefix("bert-"))
        sys.exit()
    utils.run(lambda: None)  # it keeps freed memory
    for name in args.rows:
        ROWS[name]()
