"""Other people's networks as teachers: torchvision's, with random weights, two steps of each method.

A pair of network and method works, or the script refuses the network in one sentence. Anything else fails.
"""
import pytest
import torch
import torchvision
from PIL import Image

import running
from conftest import METHODS, THREADS, common, deepinversion, regulated_kd

NETWORKS = ("resnet18", "mobilenet_v3_small", "densenet121", "swin_t", "googlenet")
REFUSED = {("swin_t", deepinversion): "has no BatchNorm"}      # a part of the sentence that refuses it
TINY = {    # settings with which two steps take seconds
    "csd": "--student-steps 2 --synthesis-batch-size 10 --synthesis-steps 2 --bank-rounds 1 "
           "--bank-synthesis-steps 2 --latent-dim 8",
    "plain_inversion": "--student-steps 2 --synthesis-batch-size 10 --synthesis-steps 2 --bank-rounds 1 "
                       "--bank-synthesis-steps 2 --latent-dim 8",
    "cudfkd": "--student-steps 2 --round-steps 2 --synthesis-batch-size 8 --latent-dim 8 --generator-width 8",
    "dafl": "--student-steps 2 --latent-dim 8 --generator-width 8",
    "deepinversion": "--student-steps 2 --initial-batches 1 --pool-batches 2 --synthesis-batch-size 8 "
                     "--synthesis-steps 2",
    "rdskd": "--student-steps 2 --generator-epochs 1 --generator-steps 2 --synthesis-batch-size 8 "
             "--latent-dim 8 --generator-width 8",
    "regulated_kd": "--teacher-epochs 1 --teacher-batch-size 8",
    "surrogate_kd": "--pool-images 20 --pool-budget 1"}


def __getattr__(name):
    """`test_any_teacher:resnet18` is a network as --teacher takes it: the function that builds it."""
    if name not in NETWORKS:
        raise AttributeError(name)
    more = dict(init_weights=True) if name == "googlenet" else {}
    return lambda: torchvision.models.get_model(name, num_classes=10, **more)


@pytest.fixture
def images(in_tmp):
    """A folder with two random pictures a class, for training and test: scores mean nothing here."""
    with common.seeded(0):
        pixels = torch.randint(256, (2, 10, 2, 32, 32, 3), dtype=torch.uint8)
    for part, classes in zip(("train", "test"), pixels):
        for label, pictures in enumerate(classes):
            path = in_tmp / "images" / part / str(label)
            path.mkdir(parents=True)
            for number, picture in enumerate(pictures):
                Image.fromarray(picture.numpy()).save(path / f"{number}.png")
    return "folder:images"


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_teaches_or_is_refused_in_a_sentence(network, images, capsys, monkeypatch):
    monkeypatch.setattr(regulated_kd, "load_dataset", common.load_dataset)   # the pictures, not fewer digits
    monkeypatch.setattr(running, "drawn_pictures", lambda data: common.drawn_pictures(data, 20))
    for method in METHODS:
        argv = ["--teacher", f"test_any_teacher:{network}", "--student", "wrn10_1", "--preset", "cifar10",
                "--dataset", images, "--epochs", "1", "--batch-size", "8", "--threads", str(THREADS),
                "--device", "cpu", "--out", method.__name__, *TINY[method.__name__].split()]
        if (network, method) not in REFUSED:
            method.main(argv)
            assert "last epoch: student" in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit) as stop:
            method.main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and REFUSED[network, method] in error and error.count("\n") == 1
