"""Use a fine-tuned model: base and adapter, or a whole model; let it write, and look at what its heads look at.

You learn here: what is kept of a fine-tuning, and how it goes back into its base; how sampling turns scores into text;
how tokens become characters while they arrive; how to read attention.

    python 06_finetune/load_model.py --prompt "ROMEO:"            what train.py left in outputs/
    python 06_finetune/load_model.py --model gpt2                 a model without fine-tuning (gpt2, smollm2)
    python 06_finetune/load_model.py --model my_adapter/          an adapter in PEFT's format
    python 06_finetune/load_model.py --save merged/               write base and adapter as one model

You should see: text as it is written, about 200 tokens per second with the stand-in. Writes: outputs/attention.png,
what each head looks at; with --save a folder that transformers opens. Left out: beam search; several prompts or
adapters at once."""
import codecs
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from gpt2 import generate, shrink
from load import SMOLLM2, Base, find_base
from lora import merge, remove
from peft_files import load_adapter, read_config
from train import SCRIPT

# Shapes: T time (tokens), A attention heads; the batch is 1, and `layers` how many there are


def newest(outputs: Path) -> Path:
    """What train.py wrote last: outputs/adapter or outputs/model. Raises utils.InputError where there is neither."""
    found = [path.parent for path in (outputs / "adapter" / "adapter_config.json", outputs / "model" / "config.json")
             if path.exists()]
    if not found:
        raise utils.InputError(f"{outputs} holds neither adapter/ nor model/; make one with: python {SCRIPT}")
    return max(found, key=lambda folder: max(path.stat().st_mtime for path in folder.iterdir()))


def load_model(name: str, base_name: str | None = None) -> tuple[nn.Module, Base, str]:
    """(model, its base with the tokenizer, what it is in words) for an adapter's folder, a model's, or a name.

    base_name: for an adapter whose config names a base that is not to be found here. Raises utils.InputError.
    """
    config_path = Path(name) / "adapter_config.json"
    if not config_path.exists():
        if base_name:
            raise utils.InputError(f"a base is for an adapter, and {name} is none; leave it out.")
        base = find_base(name)
        return base.read(), base, f"{base.label}, without adapter"
    ## An adapter is a fraction of a model, and its config names the rest, for example as the hub does.
    named = read_config(config_path).get("base_model_name_or_path")
    known = {"openai-community/gpt2": "gpt2", **dict.fromkeys([SMOLLM2, str((utils.DATA_DIR / "smollm2").resolve())],
                                                              "smollm2")}
    base_name = base_name or known.get(str(named), str(named))
    if base_name not in ("gpt2", "smollm2", "stand-in") and not Path(base_name).is_dir():
        raise utils.InputError(f"{name} is an adapter for {named!r}, and {base_name} is not here; give the folder of "
                               "its base (--base).")
    base = find_base(base_name)
    model = base.read()
    config = load_adapter(model, name, base.module.PREFIX)
    ## Merged, the adapter costs nothing more: what is written is an ordinary model from here on.
    merge(model)
    remove(model)
    return model.eval(), base, f"{base.label} with the adapter {name} (rank {config['r']}) merged into it"


# ---------------------------------------------------------------------------------------------- attention
@torch.inference_mode()
def attention_weights(model: nn.Module, ids: Tensor) -> Tensor:
    """Every head's weights for ids (1, T): (layers, A, T, T); row t is a distribution over what position t looks at."""
    layers = [layer for layer in model.modules() if hasattr(layer, "keep_weights")]
    for layer in layers:
        layer.keep_weights = True
    model.hidden(ids)
    for layer in layers:
        layer.keep_weights = False
    return torch.cat([layer.weights.float().cpu() for layer in layers])


def draw_attention(weights: Tensor, tokens: list[str], layer: int, title: str, path: Path) -> None:
    """Heatmaps of one layer's heads: weights (layers, A, T, T), one row per token, one column per token looked at.

    ## Many heads of a trained model rest on the first token, which carries nothing of interest: weights have to sum to
    ## 1, and a head that finds nothing to do has to put them somewhere (the attention sink, Xiao et al. 2023).
    """
    A, T = weights.shape[1], min(len(tokens), 40)
    columns = min(A, 4)
    rows = -(-A // columns)
    figure, axes = utils.pyplot().subplots(rows, columns, squeeze=False, figsize=(4 * columns, 4 * rows))
    for a in axes.flat[A:]:
        a.remove()
    for head, a in enumerate(axes.flat[:A]):
        a.imshow(weights[layer, head, :T, :T].numpy(), cmap="viridis", vmin=0, vmax=1)
        a.set_xticks(range(T), tokens[:T], fontsize=5, rotation=90, parse_math=False)  # "$" is a token here
        a.set_yticks(range(T), tokens[:T], fontsize=5, parse_math=False)
        a.set_title(f"layer {layer}, head {head}", fontsize=9)
        a.grid(False)
    figure.suptitle(f"Who (row) looks at what (column); dark is 0, yellow is 1\n{title}", y=0.995, fontsize=10,
                    parse_math=False)
    figure.tight_layout()
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "dtype", "seed")
    add = parser.add_argument
    add("--model", help="gpt2, smollm2, stand-in, or the folder of a model or adapter; without it, train.py's last")
    add("--base", help="an adapter's base, where it is not what its config names")
    add("--prompt", default="\n", help="the text to continue")
    add("--length", type=utils.count, default=200, help="tokens to write at most")
    add("--temperature", type=utils.number(float, "[0, inf)"), default=0.8, help="0: always the likeliest; 1: as the "
        "model believes; above that: wilder")
    add("--top-k", type=utils.count, help="draw from the k likeliest only")
    add("--no-cache", action="store_true", help="compute everything again for every token, to see the difference")
    add("--layer", type=utils.number(int, "[0, inf)"), default=0, help="whose heads are drawn")
    add("--save", type=Path, help="write the model, adapter merged in, to this folder")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    device, dtype = args.device, args.dtype
    model, base, what = load_model(args.model or str(newest(args.out)), args.base)
    if args.layer >= base.config["n_layer"]:
        raise utils.InputError(f"--layer {args.layer}: this model has the layers 0 to {base.config['n_layer'] - 1}.")
    ids = base.tokenizer.encode(args.prompt, special=False)
    if not ids:
        raise utils.InputError("--prompt is empty; give at least one character, such as a line break.")
    print(f"{what}; {sum(p.numel() for p in model.parameters()):,} parameters; {dtype} on {device.type}\n")
    if args.save:
        base.tokenizer.save(args.save)
        base.module.save_model(model, args.save, base.tokenizer.end)
        print(f"wrote {args.save}, which transformers opens with from_pretrained\n")
    model.requires_grad_(False).to(device)
    if dtype == torch.bfloat16:
        ## One token is a vector: multiplying it with a matrix takes as long as fetching the matrix from memory. In
        ## bfloat16 that is half as much. What the adapter added may be lost where it is below 1/512 of a weight: for
        ## scores to the last digit, take --dtype float32.
        shrink(model)

    ## A character may be spread over several tokens, so bytes wait here until they make one.
    text = codecs.getincrementaldecoder("utf-8")("replace")
    print(args.prompt, end="", flush=True)
    written, start = [], time.perf_counter()
    generator = torch.Generator(device).manual_seed(args.seed)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for i in generate(model, ids, args.length, args.temperature, args.top_k, base.tokenizer.end,
                          not args.no_cache, generator):
            written.append(i)
            print(text.decode(base.tokenizer.decode_bytes([i])), end="", flush=True)
        seconds = time.perf_counter() - start
        print(text.decode(b"", final=True))
        print(f"\n{len(written) / seconds:,.1f} tokens per second\n")

        ## The first 128 tokens of those that fit into the positions, read in one pass with all weights kept.
        window = torch.tensor([(ids + written)[-model.config["n_positions"] :][:128]], device=device)  # (1, T)
        weights = attention_weights(model, window)
    tokens = [repr(base.tokenizer.decode([i]))[1:-1].replace(" ", "_") for i in window[0].tolist()]
    draw_attention(weights, tokens, args.layer, what, args.out / "attention.png")
    print(f"\nwrote {args.out / 'attention.png'}")
    base.notice()


if __name__ == "__main__":
    utils.run(main)
