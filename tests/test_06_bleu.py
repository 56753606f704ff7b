"""BLEU in 06_finetune/experiment.py against the worked examples of Papineni et al. 2002, and its part of the script."""

import json
import math
import random
from fractions import Fraction

import pytest
import torch
from conftest import chapter

import utils

bpe, gpt2, load, train, experiment = chapter("06_finetune", "bpe", "gpt2", "load", "train", "experiment")
words = lambda text: text.lower().rstrip(".").split()  # noqa: E731

# Papineni et al. 2002, section 2.1, examples 1 and 2
GUIDE = [words("It is a guide to action that ensures that the military will forever heed Party commands."),
         words("It is the guiding principle which guarantees the military forces always being under the command of the "
               "Party."),
         words("It is the practical guide for the army always to heed the directions of the party.")]
FIRST = words("It is a guide to action which ensures that the military always obeys the commands of the party.")
SECOND = words("It is to insure the troops forever hearing the activity guidebook that party direct.")
MAT = [words("The cat is on the mat."), words("There is a cat on the mat.")]


def precisions(candidate, truths, n):
    return experiment.bleu([candidate], [truths], n)["precisions"]


@pytest.mark.parametrize("candidate, truths, n, expected", [
    (FIRST, GUIDE, 1, Fraction(17, 18)), (SECOND, GUIDE, 1, Fraction(8, 14)), (FIRST, GUIDE, 2, Fraction(10, 17)),
    (SECOND, GUIDE, 2, Fraction(1, 13)), (["the"] * 7, MAT, 1, Fraction(2, 7)), (["the"] * 7, MAT, 2, 0),
    (["of", "the"], GUIDE, 1, 1), (["of", "the"], GUIDE, 2, 1),  # section 2.2: precision alone is not enough
])
def test_the_papers_modified_precisions(candidate, truths, n, expected):
    assert precisions(candidate, truths, n)[-1] == pytest.approx(float(expected), abs=1e-12)


def test_the_papers_brevity_penalty():
    """Section 2.2.2: references of 12, 15 and 17 words; 12 is a best match. And what is shorter is punished."""
    truths = [[f"a{i}" for i in range(n)] for n in (12, 15, 17)]
    penalty = lambda c: experiment.bleu([["a0"] * c], [truths], 1)["brevity_penalty"]  # noqa: E731
    assert penalty(12) == 1 and penalty(15) == 1 and penalty(40) == 1
    assert penalty(13) == 1  # 12 is nearest
    assert penalty(14) == pytest.approx(math.exp(1 - 15 / 14))  # nearest is 15
    assert penalty(16) == 1  # 15 and 17 are as near: the shorter one
    assert penalty(10) == pytest.approx(math.exp(1 - 12 / 10)) and penalty(0) == 0
    ## Over a collection lengths are summed before they are compared: one short text is made good by a long one.
    both = experiment.bleu([["a0"] * 2, ["a0"] * 22], [truths, truths], 1)
    assert both["brevity_penalty"] == pytest.approx(math.exp(1 - 29 / 24))


def test_bleu_against_values_of_nltk():
    """nltk 3.10's corpus_bleu on the paper's examples. By hand, both were also equal on 3,000 collections of random
    words, and sacrebleu 2.6 on 300."""
    found = experiment.bleu([FIRST], [GUIDE])
    assert found["bleu"] == pytest.approx(0.5045666840058485, abs=1e-12) and found["brevity_penalty"] == 1
    assert experiment.bleu([SECOND], [GUIDE])["bleu"] == 0  # no three words of it stand in a reference
    assert experiment.bleu([SECOND], [GUIDE], 2)["bleu"] == pytest.approx(0.18174699151949172, abs=1e-12)
    assert experiment.bleu([FIRST, SECOND], [GUIDE, GUIDE])["bleu"] == pytest.approx(0.3043537261305561, abs=1e-12)


def test_bleu_by_its_definition_on_random_words():
    """Every n-gram looked up by hand, in whole numbers."""
    r = random.Random(0)
    for _ in range(300):
        text = lambda: r.choices("abc", k=r.randrange(0, 9))  # noqa: E731
        pairs = [(text(), [text() for _ in range(r.randrange(1, 4))]) for _ in range(r.randrange(1, 4))]
        found = experiment.bleu(*map(list, zip(*pairs)))
        expected = []
        for n in (1, 2, 3, 4):
            right = total = 0
            for candidate, truths in pairs:
                grams = lambda some: [tuple(some[i : i + n]) for i in range(len(some) - n + 1)]  # noqa: E731, B023
                total += len(grams(candidate))
                for gram in set(grams(candidate)):
                    right += min(grams(candidate).count(gram), max(grams(truth).count(gram) for truth in truths))
            expected.append(right / total if total else 0.0)
        assert found["precisions"] == pytest.approx(expected, abs=1e-12)
        product = math.prod(expected) ** 0.25 * found["brevity_penalty"]
        assert found["bleu"] == pytest.approx(product, abs=1e-12)


def test_a_text_against_itself_and_against_nothing():
    texts = [FIRST, SECOND]
    assert experiment.bleu(texts, [[text] for text in texts])["bleu"] == pytest.approx(1.0)
    assert experiment.bleu([[], []], [[FIRST], [SECOND]]) == {"bleu": 0.0, "precisions": [0.0] * 4,
                                                              "brevity_penalty": 0.0}
    with pytest.raises(ValueError):
        experiment.bleu(texts, [[FIRST]])  # a reference is missing
    assert experiment.to_words("Don't, he said\n1,000") == ["don", "'", "t", ",", "he", "said", "1", ",", "000"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder of a tiny GPT-2, path of a short text)."""
    folder = tmp_path_factory.mktemp("small")
    manual = bpe.read_text("pydocs")
    tokenizer = bpe.Tokenizer(*bpe.train_bpe(manual[:20_000], 300))
    torch.manual_seed(0)
    size = {"vocab_size": 300, "n_positions": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    gpt2.save_model(gpt2.GPT2(size), folder / "base", tokenizer.vocab[bpe.END])
    tokenizer.save(folder / "base")
    (folder / "text.txt").write_text(manual[:9_000])
    return folder / "base", folder / "text.txt"


def test_passages_are_held_out_and_follow_each_other(small):
    base = load.find_base(str(small[0]))
    text = load.load_data(str(small[1]), base.tokenizer, 1)
    passages = experiment.passages_of(text, base, 5, 16, 32)
    whole = base.tokenizer.decode(text.val.tolist())
    assert len(passages) == 5 and all(prompt + truth in whole for prompt, truth in passages)
    assert whole.startswith(passages[0][0]) and whole.endswith(passages[-1][1])
    assert len({prompt for prompt, _ in passages}) == 5
    assert len(experiment.passages_of(text, base, 1000, 16, 32)) == len(text.val) // 48
    with pytest.raises(utils.InputError, match="too few for two passages"):
        experiment.passages_of(text, base, 5, 16, len(text.val))


def test_the_part_bleu_of_the_script(small, tmp_path, monkeypatch, capsys):
    """In this process, with train.py's too: three methods, and the rows that need no model."""
    def in_process(options, out):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, options), "--out", str(out)])
        train.main()

    monkeypatch.setattr(experiment, "train", in_process)
    options = ["--model", small[0], "--data", small[1], "--steps", 4, "--seeds", 1, "--device", "cpu",
               "--block-size", 16, "--batch-size", 2, "--passages", 6, "--only", "bleu", "--out", tmp_path]
    monkeypatch.setattr("sys.argv", ["experiment.py", *map(str, options)])
    experiment.main()
    assert {path.name for path in tmp_path.iterdir()} == {"experiment_bleu.json"}
    rows = {row["name"]: row for row in json.loads((tmp_path / "experiment_bleu.json").read_text())["tables"]["bleu"]}
    assert list(rows)[4:] == ["before fine-tuning", "LoRA, rank 8", "last block alone", "full"]
    assert [len(row["bleu"]) for row in rows.values()] == [1] * 8
    assert rows["the true continuation"]["mean"] == pytest.approx(100)
    shuffled = rows["its words, shuffled"]
    assert shuffled["precisions"][0] == 1 and shuffled["precisions"][1] < 0.5 and shuffled["mean"] < 50
    assert all(0 <= row["mean"] <= 100 and 0 < row["brevity_penalty"] <= 1 for row in rows.values())
    text = capsys.readouterr().out
    assert "6 held-out passages" in text and all(name in text for name in rows)
    for bad in (["--passages", 1], ["--passages", 0]):
        monkeypatch.setattr("sys.argv", ["experiment.py", *map(str, [*options, *bad])])
        with pytest.raises(SystemExit):
            experiment.main()
        assert "argument --passages" in capsys.readouterr().err
