"""The worked exercises: each learns, or equals what it should, on stand-ins and with small options."""

import http.client
import importlib.util
import json
import struct
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call_main, chapter, refusal

import utils

FOLDER = ROOT / "tests" / "exercises"


def exercise(name, *chapter_scripts):
    """Import an exercise by path. The scripts of the one chapter that it imports by their plain names come first."""
    if chapter_scripts:
        chapter(*chapter_scripts)
    spec = importlib.util.spec_from_file_location(f"exercise_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = chapter("01_basics", "train")
serve = exercise("serve", "01_basics", "load", "train", "load_model")
quantise = exercise("quantise", "05_transformer", "load", "train", "load_model")
tensorboard_log, vit, captions = exercise("tensorboard_log"), exercise("vit"), exercise("captions")


# ---------------------------------------------------------------------------------------------- serve.py
@pytest.fixture(scope="module")
def saved_digits(tmp_path_factory):
    """A network of random weights, saved as 01's train.py saves: the endpoint must agree with it, right or wrong."""
    path = tmp_path_factory.mktemp("digits") / "model.pt"
    torch.manual_seed(0)
    state = {"script": digits.SCRIPT, "config": {"hidden": 32}, "data": "typeset", "stand_in": "MNIST", "mean": 0.2,
             "std": 0.3, "model": digits.SimpleNN(hidden=32).state_dict()}
    utils.write_atomically(path, torch.save, state)
    return path


@pytest.fixture(scope="module")
def reader(saved_digits):
    return serve.Reader(saved_digits)


@pytest.fixture
def port(reader):
    server = serve.make_server(reader, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_answers_over_http_are_those_offline(reader):
    x, y = torch.randint(256, (60, 28, 28), dtype=torch.uint8), torch.randint(10, (60,))
    found = serve.check(reader, x, y, clients=3)
    assert found["differ"] == 0 and found["online"] == found["offline"] and found["largest"] < 1e-5
    assert reader.probabilities(x).argmax(1).unique().numel() > 1  # not one answer for everything


def test_threads_that_answer_record_no_gradients(reader):
    kept = []
    x = torch.zeros(1, 28, 28, dtype=torch.uint8)
    thread = threading.Thread(target=lambda: kept.append((torch.is_grad_enabled(), reader.probabilities(x))))
    thread.start()
    thread.join()
    assert kept[0][0] and not kept[0][1].requires_grad  # gradients are on in a new thread, and off in the function


def request(port, method, body, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, "/", body, headers or {})
    reply = connection.getresponse()
    assert reply.getheader("Content-Type") == "application/json"
    return reply.status, json.loads(reply.read())


def test_a_drawn_digit_of_any_size_is_prepared_as_chapter_01_does(port, reader, tmp_path):
    picture = torch.full((90, 70), 255, dtype=torch.uint8)
    picture[15:75, 30:38] = 20  # a 1, dark on white
    path = tmp_path / "one.png"
    serve.to_pil_image(picture).save(path)
    status, answer = request(port, "POST", path.read_bytes())
    p = reader.probabilities(serve.read_image(path)[None])[0]
    assert status == 200 and answer["digit"] == p.argmax().item()
    assert answer["probabilities"] == pytest.approx(p.tolist())


@pytest.mark.parametrize("method, body, headers, words", [
    ("POST", b"no picture", {}, "can't be read as a picture"),
    ("POST", b"", {}, "Content-Length"),
    ("POST", b"x", {"Content-Length": "-1"}, "Content-Length"),
    ("POST", b"x", {"Content-Length": "9" * 5000}, "Content-Length"),
    ("GET", None, {}, "POST the bytes"),
])
def test_bad_requests_get_one_sentence_as_json(port, method, body, headers, words):
    status, answer = request(port, method, body, headers)
    assert status == 400 and list(answer) == ["error"] and words in answer["error"]


def test_a_blank_picture_is_refused_in_the_words_of_chapter_01(port, tmp_path):
    serve.to_pil_image(torch.full((60, 60), 255, dtype=torch.uint8)).save(tmp_path / "blank.png")
    status, answer = request(port, "POST", (tmp_path / "blank.png").read_bytes())
    assert status == 400 and answer["error"].startswith("the picture looks blank")


def test_serve_runs(saved_digits, tmp_path):
    out = call_main(serve, "--model", saved_digits, "--check", 40, "--clients", 2)
    assert "0 answers differ" in out and "99th percentile" in out
    assert "does not exist" in refusal(serve, "--model", tmp_path / "none.pt")
    assert "choose another port" in refusal(serve, "--model", saved_digits, "--port", 70000)


# ---------------------------------------------------------------------------------------------- quantise.py
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("per_row", [True, False])
def test_every_weight_is_at_most_half_a_step_off(bits, per_row):
    w = torch.randn(7, 33) * torch.logspace(-3, 1, 7)[:, None]
    w[3] = 0
    q, scale = quantise.quantise(w, bits, per_row)
    assert q.abs().max() == 2 ** (bits - 1) - 1 and scale.shape == ((7, 1) if per_row else (1, 1))
    assert ((q * scale - w).abs() <= scale * 0.5001).all() and not q[3].any()
    packed = quantise.pack(q, bits)
    assert packed.numel() == -(-w.numel() * bits // 8)
    assert torch.equal(quantise.unpack(packed, bits, tuple(q.shape)), q)


def test_quantise_against_pytorch():
    w = torch.randn(5, 64)
    q, scale = quantise.quantise(w, 8)
    zeros = torch.zeros(5, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(w, scale.flatten(), zeros, 0, -128, 127)
    torch.testing.assert_close(q * scale, theirs)


def test_int8_layers_compute_what_their_weights_say():
    linear = torch.nn.Linear(64, 48, bias=False)
    x = torch.randn(2, 32, 64)
    q, scale = quantise.quantise(linear.weight.detach(), 8)
    torch.testing.assert_close(quantise.Int8Linear(linear, False)(x), x @ (q * scale).T)
    if hasattr(torch, "_int_mm"):
        y, exact = quantise.Int8Linear(linear, True)(x), linear(x)
        assert 0 < (y - exact).std() < 0.02 * exact.std()


@pytest.fixture(scope="module")
def small_gpt(tmp_path_factory):
    """A small GPT on a text of its own, learned in a few seconds."""
    out = tmp_path_factory.mktemp("gpt")
    (out / "text.txt").write_text("the cat sat on the mat. a dog ran to the cat! " * 120)
    options = ["--n-layer", 1, "--n-embd", 32, "--n-head", 2, "--block-size", 32, "--batch-size", 4, "--steps", 60,
               "--eval-every", 60, "--dtype", "float32", "--device", "cpu", "--data", out / "text.txt", "--out", out]
    call_main(captions.gpt, *options)
    return out


def test_quantise_runs_and_fewer_bits_cost_more(small_gpt, tmp_path):
    options = ["--model", small_gpt / "model.pt", "--data", small_gpt / "text.txt"]
    out = call_main(quantise, *options, "--rounds", 1, "--out", tmp_path)
    rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    loss = {name: float(rows[name][2]) for name in ("float32", "8 bits, a scale per row", "4 bits, a scale per row",
                                                    "3 bits, a scale per row")}
    assert abs(loss["8 bits, a scale per row"] - loss["float32"]) < 0.01
    assert loss["float32"] < 2 and loss["3 bits, a scale per row"] > loss["8 bits, a scale per row"]
    saved = utils.load_checkpoint(tmp_path / "quantised.pt", quantise.SCRIPT)
    original = utils.load_checkpoint(small_gpt / "model.pt", "05_transformer/train.py")["model"]
    restored = quantise.unpack_state(saved["model"])
    assert restored.keys() == original.keys()
    for name, w in original.items():
        assert (restored[name] - w).abs().max() <= w.abs().max() / 127 * 0.51
    assert "milliseconds" in out


# ---------------------------------------------------------------------------------------------- tensorboard_log.py
def test_checksum_and_varints_against_known_values():
    assert tensorboard_log.crc32c(b"123456789") == 0xE3069283
    assert tensorboard_log.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert tensorboard_log.crc32c(bytes(range(32))) == 0x46DD794E
    assert [tensorboard_log.varint(n).hex() for n in (0, 127, 128, 300)] == ["00", "7f", "8001", "ac02"]


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "a run" / "metrics.json"
    path.parent.mkdir()
    rows = [{"step": 100 * i, "seconds": 2.0 * i, "epoch": i, "val_loss": 1 / 3 / i, "note": "text"}
            for i in (1, 2, 30)]
    path.write_text(json.dumps({"script": "x", "seconds": 60.0, "history": rows,
                                "metrics": {"test_accuracy": 0.9, "name": "no number", "flag": True}}))
    return path


def test_event_file_record_by_record(run_file, tmp_path):
    assert tensorboard_log.convert(run_file, tmp_path) == 7
    data = (tmp_path / "events.out.tfevents.0.metrics").read_bytes()
    records = []
    while data:
        (n,), rest = struct.unpack("<Q", data[:8]), data[12:]
        assert struct.unpack("<I", data[8:12])[0] == tensorboard_log.masked(tensorboard_log.crc32c(data[:8]))
        records.append(rest[:n])
        assert struct.unpack("<I", rest[n : n + 4])[0] == tensorboard_log.masked(tensorboard_log.crc32c(rest[:n]))
        data = rest[n + 4 :]
    assert len(records) == 5 and records[0].endswith(b"brain.Event:2")
    assert b"\x0a\x08val_loss\x15" + struct.pack("<f", 1 / 3) in records[1] and b"note" not in b"".join(records)


def test_tensorboard_reads_back_every_number(run_file, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tensorboard_log.convert(run_file, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["epoch", "final/test_accuracy", "val_loss"]
    read = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert read == [(100 * i, torch.tensor(1 / 3 / i).item()) for i in (1, 2, 30)]
    times = [event.wall_time for event in events.Scalars("val_loss")]
    assert times[1] - times[0] == pytest.approx(2, abs=1e-3)


def test_tensorboard_log_runs(run_file, tmp_path):
    assert "7 scalars" in call_main(tensorboard_log, run_file, "--out", tmp_path / "runs")
    assert (tmp_path / "runs" / "a run" / "events.out.tfevents.0.metrics").exists()
    assert "does not exist" in refusal(tensorboard_log, tmp_path / "none", "--out", tmp_path)
    (tmp_path / "bad.json").write_text("[]")
    assert "no metrics.json" in refusal(tensorboard_log, tmp_path / "bad.json", "--out", tmp_path)


# ---------------------------------------------------------------------------------------------- vit.py
def small_vit(**options):
    torch.manual_seed(0)
    options = {**dict(n_layer=2, n_head=2, n_embd=32), **options}
    model = vit.ViT(5, torch.tensor([0.5] * 3), torch.tensor([0.25] * 3), **options)
    for p in model.blocks.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_attention_without_mask_against_pytorch():
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    y, p = vit.attend_to_all(q, k, v)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))


def test_every_patch_sees_every_other_and_chapter_05_stays_causal():
    x = torch.randn(1, 6, 32)
    later = x.clone()
    later[:, 5] += 1
    for module, sees in ((vit.gpt, True), (captions.gpt, False)):  # each exercise has a copy of chapter 05 of its own
        torch.manual_seed(0)
        block = module.Block(32, 2, 0.0)
        tables = module.rotary_tables(6, 16)
        assert torch.equal(block(x, *tables)[:, 0], block(later, *tables)[:, 0]) != sees


def test_positions_are_what_tells_patches_apart():
    """Without them a ViT sees a bag of patches; with them, whichever kind, moving patches about makes a difference."""
    x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    patches = F.pixel_unshuffle(x.float(), vit.P).flatten(2)[:, :, torch.randperm(64)]  # (2, 48, 64)
    moved = F.pixel_shuffle(patches.view(2, 48, 8, 8), vit.P).to(torch.uint8)
    for positions in ("none", "rotary", "learned"):
        model = small_vit(positions=positions)
        if positions == "learned":
            torch.nn.init.normal_(model.position)
        assert torch.allclose(model(x), model(moved), atol=1e-5) == (positions == "none")


def test_rotary_scores_depend_on_the_distance_in_rows_and_columns_alone():
    cos, sin = vit.rotary_2d(8, 16)
    q, k = torch.randn(2, 16)
    turn = lambda v: vit.gpt.rotate(v.expand(1, 64, 2, 1, 16), cos, sin)[0, :, 0, 0].view(8, 8, 16)  # noqa: E731
    scores = torch.einsum("abd,ced->abce", turn(q), turn(k))  # query row, column; key row, column
    assert torch.allclose(scores[2, 3, 4, 1], scores[5, 6, 7, 4], atol=1e-4)
    assert not torch.allclose(scores[2, 3, 4, 1], scores[2, 3, 3, 1], atol=1e-4)  # one row nearer
    assert not torch.allclose(scores[2, 3, 4, 1], scores[2, 3, 4, 2], atol=1e-4)  # one column nearer


def test_a_few_pictures_can_be_learned_by_heart():
    """Random dots have no shape that a filter or a patch could know beforehand."""
    torch.manual_seed(0)
    x, y = torch.randint(256, (20, 3, 32, 32)).byte(), torch.arange(20) % 5
    model = vit.ViT(5, torch.tensor([0.5] * 3), torch.tensor([0.25] * 3), n_layer=2, n_head=2, n_embd=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_vit_runs_on_the_stand_in(tmp_path):
    out = call_main(vit, "--data", "shapes", "--seconds", 1, "--n-layer", 2, "--n-embd", 48, "--dtype", "float32",
              "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert 0 < metrics["vit_val_accuracy"] < 1 and 0 < metrics["simple_val_accuracy"] < 1, out
    assert "vit_test_accuracy" not in metrics and out.count("STAND-IN") == 2
    assert "n_embd 50" in refusal(vit, "--data", "shapes", "--n-embd", 50, "--out", tmp_path)


# ---------------------------------------------------------------------------------------------- captions.py
@pytest.fixture(scope="module")
def tiles():
    return captions.pictures.draw_shapes(200, 1)


def test_captions_say_what_was_drawn(tiles):
    """Each tile is one flat colour here, so that the pixels of a quarter tell which tile it holds."""
    labels = torch.arange(10)
    flat = (20 * torch.arange(10) + 30)[:, None, None, None].expand(10, 3, 32, 32).to(torch.uint8).clone()
    flat[:, 1] += 5  # not grey
    x, texts = captions.scenes(flat, labels, 50, torch.Generator().manual_seed(0))
    corners = dict(zip(captions.PLACES, [(0, 0), (0, 32), (32, 0), (32, 32)]))
    for picture, text in zip(x, texts):
        things = captions.parse(text)
        assert 1 <= len(things) <= 3
        for place, (top, left) in corners.items():
            cell = picture[:, top : top + 32, left : left + 32].float()
            if place in things:
                grey, shape = things[place]
                k = captions.pictures.SHAPES.index(shape)
                assert cell[0, 0, 0] == (20 * k + 30 + (1 if grey else 0)) and (cell[0] == cell[1]).all() == grey
            else:
                assert cell.std(dim=(1, 2)).min() > 1  # an empty quarter has noise


def test_parse_refuses_what_is_no_caption():
    assert captions.parse("a grey star top left, a ring bottom right") == {"top left": (True, "star"),
                                                                          "bottom right": (False, "ring")}
    assert all(captions.parse(text) is None for text in ("", "a star", "a star top", "star top left", "a cat top left"))


def test_targets_are_the_next_characters_and_padding_does_not_count():
    inputs, targets = captions.encode(["a ring", "a"])
    text = lambda ids: "".join(captions.VOCAB[i] for i in ids if i >= 0)  # noqa: E731
    assert text(inputs[0]) == "\na ring" and text(targets[0]) == "a ring\n" and text(targets[1]) == "a\n"
    assert (targets[1] == -100).sum() == 5


def small_captioner(**options):
    torch.manual_seed(0)
    simple = captions.cnn.Simple(20, torch.tensor([0.5] * 3), torch.tensor([0.25] * 3), widths=(16, 32, 64)).eval()
    return captions.Captioner(simple.requires_grad_(False), n_layer=2, n_head=2, n_embd=32, **options)


def test_the_eyes_see_a_scene_as_they_see_its_quarters(tiles):
    """Away from the seams, that is: so the shapes are cut off there, and what is left is the same."""
    model = small_captioner()
    x = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    x[:, :, 8:24, 40:56] = 200  # in the top right quarter, a square
    x[:, :, 40:56, 8:24] = 90
    h = model.encoder(x)[0]  # (C, 2, 2)
    for row in (0, 1):
        for column in (0, 1):
            quarter = x[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            alone = torch.nn.Sequential(*list(model.encoder)[:-1])(quarter)[0][:, 1:3, 1:3].amax((1, 2))
            inside = torch.nn.Sequential(*list(model.encoder)[:-1])(x)[0][
                :, 4 * row + 1 : 4 * row + 3, 4 * column + 1 : 4 * column + 3].amax((1, 2))
            torch.testing.assert_close(alone, inside)
            assert (h[:, row, column] >= inside - 1e-6).all()


def test_without_a_picture_the_captioner_is_chapter_05s_gpt():
    model = small_captioner()
    ids = torch.randint(len(captions.VOCAB), (2, 9))
    torch.testing.assert_close(model(torch.zeros(2, 0, 32), ids), model.gpt(ids))


def test_the_picture_reaches_the_text_unless_it_is_blind(tiles):
    a, b = captions.scenes(*tiles, 2, torch.Generator().manual_seed(0))[0].split(1)
    ids = torch.randint(len(captions.VOCAB), (1, 9))
    for blind in (False, True):
        model = small_captioner(blind=blind).eval()
        torch.nn.init.normal_(model.gpt.blocks[0].attention.out.weight)  # nearly zero at first
        assert torch.equal(model(model.look(a), ids), model(model.look(b), ids)) == blind


def test_grades_on_captions_with_known_answers():
    true = ["a star top left", "a ring top left, a disc top right", "a grey ring top left", "a disc top right"]
    said = ["a star top left", "a ring top left", "a ring top left", "nonsense"]
    grades = captions.grade(said, true)
    assert grades == pytest.approx({"exact": 1 / 4, "count": 2 / 4, "places": 2 / 4, "shape": 3 / 5, "grey": 2 / 5})


def test_a_few_scenes_can_be_learned_by_heart(tiles):
    """Two scenes with different captions: only who sees the picture can write both."""
    model = small_captioner()
    x, texts = captions.scenes(*tiles, 4, torch.Generator().manual_seed(3))
    assert len(set(texts)) == 4
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(x, texts).backward()
        optimizer.step()
    assert captions.grade(captions.write(model, x), texts)["exact"] >= 0.75


def test_captions_runs(tmp_path):
    small = ["--steps", 30, "--epochs", 1, "--batch-size", 8, "--tiles", 250, "--scenes", 20]
    out = call_main(captions, *small, "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["with the picture, nats per character"] < 2.5 and "most frequent caption" in out
    assert (tmp_path / "captions.png").stat().st_size > 1000
    assert "--steps: 0" in refusal(captions, "--steps", 0, "--out", tmp_path)
