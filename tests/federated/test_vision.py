"""Image classification: a ViT and a Swin learn two colours, by the same loop as texts."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_cases import draw, picture_folder, processor, save_model
from side_by_side import F64, SIZES, TOTAL, compare, lora_exchange
from staged_runs import Stop, StopAfter

from fastrank.data import EncodedImages
from fastrank.errors import UsageError
from fastrank.federated import Simulation
from fastrank.federated.callbacks import ConsoleReport
from fastrank.federated.export import digest
from fastrank.federated.local import LocalOptions
from fastrank.federated.model import ResidentModel
from fastrank.federated.passes import tokens_of
from fastrank.federated.stacked_probe import disagreement
from fastrank.federated.stacked_training import Job

pytest.importorskip("PIL.Image", reason="pip install 'fastrank[vision]'")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny ViT and a tiny Swin, by name."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in ("vit", "swin")}


@pytest.fixture
def options(models, pictures, tmp_path):
    return {
        "model": str(models["vit"]), "dataset": str(pictures), "num_clients": 4,
        "clients_per_round": 2, "num_rounds": 3, "partition": "iid",
        "per_device_train_batch_size": 8, "num_threads": 1, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def logits_of(model, reader, data, count=6):
    from PIL import Image

    images = [Image.open(e.source) for e in data.test.examples[:count]]
    with torch.no_grad():
        return model(**reader(images, return_tensors="pt")).logits


# -- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_lora_learns_colours_and_loads_with_peft(options, models, kind, caplog):
    from peft import AutoPeftModel, PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    simulation = Simulation(method="fedit", **options | {"model": str(models[kind])})
    result = simulation.run()
    assert result.summary["accuracy"] == 1.0 > result.summary["initial_accuracy"]
    assert (result.summary["chance"], result.summary["eval_unit"]) == (0.5, "images")
    folder = Path(options["output_dir"])
    config = json.loads((folder / "config.json").read_text())
    assert config["resolved"]["executor"] == "ClientParallel"
    assert config["resolved"]["task"] == "image-cls"
    assert config["versions"]["pillow"]
    assert "one after another" not in caplog.text  # Swin's windows keep a batch in order
    ours = simulation.model.logits(simulation.model.collate(simulation.test, np.arange(6)))
    reader = AutoImageProcessor.from_pretrained(folder / "adapter")
    alone = AutoPeftModel.from_pretrained(folder / "adapter").eval()
    base = AutoModelForImageClassification.from_pretrained(folder / "base")
    both = PeftModel.from_pretrained(base, folder / "adapter").eval()
    for model in (alone, both):
        torch.testing.assert_close(logits_of(model, reader, simulation.data), ours)
    assert alone.base_model.model.config.id2label == {0: "blue", 1: "red"}


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ("head-only", 0.9),
        ("bitfit", 0.9),
        ("fedara", 0.9),
        ("fed-plora", 0.9),
        ("slora", 0.9),
        ("sa-fedlora", 0.9),
        ("fedavg", 0.9),
        ("houlsby", 0.9),
    ],
)
def test_methods_run_on_images(options, method, least):
    own = {"fed-plora": {"client_ranks": (2, 4)}, "fedara": {"learning_rate": 3e-2},
           "bitfit": {"learning_rate": 3e-2}}  # fmt: skip
    result = Simulation(method=method, **options, **own.get(method, {})).run()
    assert result.summary["accuracy"] >= least
    if method in ("head-only", "bitfit", "fedavg"):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = Path(result.summary["result"])
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        simulation = result.model
        for name, value in simulation.model.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        assert AutoImageProcessor.from_pretrained(folder).size["height"] == 16


def test_a_resumed_run_ends_with_the_same_bits(options, tmp_path):
    options |= {"partition": None, "alpha": 0.5, "lora_dropout": 0.1}
    whole = Simulation(method="fedit", **options).run()
    assert json.loads((whole.output_dir / "config.json").read_text())["options"]["partition"] == (
        "dirichlet"
    )
    other = str(tmp_path / "other")
    with pytest.raises(Stop):
        Simulation(
            method="fedit", **options | {"output_dir": other}, callbacks=[StopAfter(2)]
        ).run()
    resumed = Simulation.resume(other)
    assert (
        digest(resumed.output_dir / "adapter")["adapter_model.safetensors"]
        == (digest(whole.output_dir / "adapter")["adapter_model.safetensors"])
    )


# -- passes ---------------------------------------------------------------------------------------


def resident(kind, folder) -> ResidentModel:
    import transformers as t

    torch.manual_seed(0)
    model = t.AutoModelForImageClassification.from_pretrained(folder, num_labels=3).to(F64)
    model = ResidentModel(
        model, processor(folder), "image-cls", ("classifier",), torch.device("cpu")
    )
    model.add_lora(r=4, lora_alpha=8.0)
    return model


def random_images(count=TOTAL):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand((count, 3, 16, 16), generator=generator, dtype=F64)
    labels = np.random.default_rng(0).integers(0, 3, size=count)
    return EncodedImages(pixels, labels, np.full(count, 5), np.arange(count), None)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_clients_side_by_side_equal_clients_alone(models, kind):
    """float64; Swin's shifted windows, merged patches and relative positions included."""
    model = resident(kind, models[kind])
    options = LocalOptions(batch_size=4, epochs=1, max_grad_norm=0.5)
    compare(model, lora_exchange(model), options, 1e-7, examples=random_images())


def test_a_model_that_mixes_images_is_noticed(models):
    model = resident("vit", models["vit"])
    inner = model.model.get_base_model().vit.layernorm
    forward = type(inner).forward
    inner.forward = lambda x: forward(inner, x - x.mean(0, keepdim=True))
    exchange = lora_exchange(model)
    plan = exchange.plan(0)
    job = Job(0, plan, exchange.send(0), [np.arange(3)], SIZES[0])
    assert "mixes the examples of a batch" in disagreement(model, job, random_images())


def test_what_an_image_costs_in_tokens(models):
    import transformers as t

    one = torch.zeros(1, 3, 16, 16)
    vit = t.ViTForImageClassification.from_pretrained(models["vit"])
    # 4 patches and the class token in each block; the head sees the latter alone
    blocks = sum(p.numel() for n, p in vit.named_parameters() if "layer" in n and p.dim() == 2)
    head = vit.classifier.weight.numel()
    assert tokens_of(vit, one) == round((5 * blocks + head) / (blocks + head)) == 5
    swin = t.SwinForImageClassification.from_pretrained(models["swin"])
    # 64 patches, then 16: the late layers are the larger ones
    assert 16 < tokens_of(swin, one) < 64
    assert not any(module._forward_hooks for module in swin.modules())


# -- models and data that don't fit ---------------------------------------------------------------


def test_a_checkpoint_with_a_head_of_other_classes(options, models, tmp_path):
    import transformers as t

    torch.manual_seed(1)
    vit = t.ViTForImageClassification.from_pretrained(models["vit"], num_labels=7)
    vit.save_pretrained(tmp_path / "seven")
    processor(tmp_path / "seven")
    simulation = Simulation(method="fedit", **options | {"model": str(tmp_path / "seven")})
    simulation.prepare()
    assert simulation.model.model.config.num_labels == 2
    held = simulation.model.read(simulation.model.head_names())
    assert [tuple(v.shape) for v in held.values()] == [(2, 32), (2,)]
    inside = dict(simulation.model.model.get_base_model().vit.named_parameters())
    name = "embeddings.patch_embeddings.projection.weight"
    assert torch.equal(inside[name], dict(vit.vit.named_parameters())[name])


def test_a_checkpoint_of_another_shape_is_refused(options, models, tmp_path):
    folder = shutil.copytree(models["vit"], tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UsageError, match=r"its weight vit\..* has another shape than its config"):
        Simulation(method="fedit", **options | {"model": str(folder)}).prepare()


def no_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def other_size(folder):
    processor(folder, size={"height": 24, "width": 24})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_processor, "give a local folder with config.json, image processor and weights"),
        (other_size, r"can't take images of \[3, 24, 24\] .*don't fit together"),
    ],
)
def test_a_model_folder_that_is_incomplete(options, models, tmp_path, harm, message):
    folder = shutil.copytree(models["vit"], tmp_path / "model")
    harm(folder)
    with pytest.raises(UsageError, match=message):
        Simulation(method="fedit", **options | {"model": str(folder)}).prepare()


def test_images_and_texts_are_not_confused(options, models, tiny_bert, csv_data):
    with pytest.raises(UsageError, match=r"data is images, but model .* \(BertConfig\) takes none"):
        Simulation(method="fedit", **options | {"model": str(tiny_bert)}).prepare()
    with pytest.raises(UsageError, match=r"data is images, but model 'embedded' \(ModernBertConf"):
        Simulation(method="fedit", **options | {"model": "embedded"}).prepare()
    with pytest.raises(UsageError, match=r"data is text, but model .* \(ViTConfig\) takes images"):
        Simulation(method="fedit", **options | {"dataset": str(csv_data)}).prepare()
    with pytest.raises(UsageError, match=r"is a folder of images, but the task is seq-cls"):
        Simulation(method="fedit", **options, task="seq-cls").prepare()


def test_nothing_is_written_when_a_picture_is_broken(options, pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "pictures")
    (root / "test" / "red" / "000.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"test/red/000.png is not a readable image: unknown form"):
        Simulation(method="fedit", **options | {"dataset": str(root)}).run()
    assert not Path(options["output_dir"]).exists()


def test_pillow_is_asked_for(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r"pip install 'fastrank\[vision\]'"):
        Simulation(method="fedit", **options).prepare()


def test_pictures_held_in_bfloat16(options, pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "pictures")
    draw(root / "train" / "red" / "large.png", (200, 50, 40), np.random.default_rng(1), side=40)
    changed = {"dataset": str(root), "dtype": "bfloat16", "num_rounds": 1}
    simulation = Simulation(method="fedit", **options | changed)
    simulation.prepare()
    batch = simulation.model.collate(simulation.train, np.array([0, 40]))
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert simulation.model.logits(batch).isfinite().all()
    assert dataclasses.asdict(simulation.config)["dtype"] == "bfloat16"


def test_a_convolutional_network_trains_its_head(options, tmp_path, capsys):
    import transformers as t

    config = t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
                            layer_type="basic")  # fmt: skip
    torch.manual_seed(0)
    t.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    processor(tmp_path / "resnet")
    options |= {"model": str(tmp_path / "resnet"), "num_rounds": 2}
    result = Simulation(method="head-only", **options, callbacks=[ConsoleReport()]).run()
    shown = capsys.readouterr().out
    assert "40 training and 16 test images, fingerprint" in shown
    assert "pixels 3 x 16 x 16 uint8, 0.0 MB of them to train on" in shown
    assert "on 16 held-out images" in shown
    losses = [row["eval_loss"] for row in result.rows]
    assert losses[1] < losses[0]
    options["output_dir"] += "2"
    with pytest.raises(UsageError, match=r"'all-linear' found no linear layer inside the blocks"):
        Simulation(method="fedit", **options).prepare()
