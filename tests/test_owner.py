"""The owner: a network that somebody else trained, none of its data, and what comes out of it again."""
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image

import common
import running
from conftest import (DATA_FREE, METHODS, ROOT, THREADS, TINY, csd, cudfkd, dafl, deepinversion,
                      plain_inversion, rdskd, real_images, regulated_kd, surrogate_kd, tiny_args,
                      tiny_networks, tiny_settings)
from helpers import equal, kl, near, refused, rows_of, save_untrained, weights_of
from test_methods import assert_same_results, each, killed, trained

GREY = common.DataSpec((1, 8, 8), 10, (0.3,), (0.4,), 1)
# A network as people write them: view after a convolution, an answer with the logits inside, another norm.
MINE = '''
import torch, torch.nn as nn
from common import DataSpec

class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, answer=lambda logits: logits):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 6, 3, padding=1), norm(6), nn.Conv2d(6, 8, 3, 2, 1)
        self.fc, self.answer = nn.Linear(8 * 4 * 4, 10), answer

    def forward(self, x):
        x = torch.relu(self.last(torch.relu(self.norm(self.first(x)))))
        return self.answer(self.fc(3 * x.view(x.size(0), -1)))

def seeded(network):
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / max(1, weight[0].numel()) ** 0.5
    return network

data = DataSpec((1, 8, 8), 10, (0.3,), (0.4,), 1)
teacher = lambda: (seeded(Net()), data)
student = Net
as_dict = lambda: (seeded(Net(answer=lambda logits: {"logits": logits})), data)
class Answer:
    def __init__(self, logits):
        self.logits = logits
as_object = lambda: (seeded(Net(answer=Answer)), data)
alone = lambda: seeded(Net())
soft = lambda: (Net(answer=lambda logits: logits.softmax(1)), data)
bytes_ = lambda: (Net(), data._replace(mean=(127.0,), std=(1 / 255,)))
seven = lambda: (Net(), data._replace(num_classes=7))
pair = lambda: (Net(), "no DataSpec")
lists = lambda: (seeded(Net()), DataSpec([1, 8, 8], 10.0, torch.tensor([0.3], dtype=torch.float64), [0.4], 1))
scores = lambda: (Net(answer=lambda logits: {"scores": logits}), data)
def forgotten():
    Net(), data
def broken():
    return Net().load_state_dict(torch.load("nowhere.pth"))
class Still(Net):
    forward = torch.no_grad()(Net.forward)
still = lambda: (seeded(Still()), data)
double = lambda: (Net().double(), data)
turned = lambda: (Net(), data._replace(image_shape=(20, 20, 3), mean=(0.5,) * 20, std=(0.5,) * 20))
scripted = lambda: (torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), data)
'''


@pytest.fixture
def mine(in_tmp, monkeypatch):
    """mine.py in the current folder, fresh for each test."""
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.syspath_prepend(str(in_tmp))
    (in_tmp / "mine.py").write_text(MINE)
    return in_tmp


def owners_args(method, teacher="teacher", **changes):
    flags = tiny_args(method, f"mine:{teacher}", **changes)
    return [*flags[2:], "--student", "mine:student"]           # without --dataset digits


# ---------------------------------------------------------------------------------------- one function is all
@each([method for method in METHODS if method is not regulated_kd])
def test_a_function_that_returns_network_and_dataspec_is_enough(method, mine, capsys):
    """No data set is asked for, or read; the run is killed, resumed, and leaves what every run leaves."""
    args = [*owners_args(method), "--out", "run", "--resume"]
    for folder in ("straight", "killed"):
        (mine / folder).mkdir()
        shutil.copy("mine.py", folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(running, "load_dataset", None)       # would be called, and cannot be
            if folder == "killed":
                with killed("after save 1"):
                    method.main(args)
            method.main(args)
    assert_same_results("straight", "killed")
    rows, said = rows_of("straight/run"), capsys.readouterr().out
    assert {path.name for path in (mine / "straight/run").iterdir()} >= {
        "student.pt", "samples.png", "curves.png", "log.jsonl"}
    assert rows[0]["arguments"]["dataset"] == "none" and tuple(rows[0]["data"]["image_shape"]) == (1, 8, 8)
    assert rows[-1]["student_acc_last"] is None and 0 <= rows[-1]["agreement_drawn"] <= 1
    assert f"no data set is named; for grey images the preset is {rows[0]['arguments']['preset']}" in said
    assert "the accuracy is not known" in said and "on drawn pictures" in said


def test_regulated_kd_says_that_it_needs_the_images(mine, capsys):
    args = [*owners_args(regulated_kd), "--preset", "digits"]
    assert "needs real images" in refused(regulated_kd, args, capsys)


@pytest.mark.parametrize("teacher", ["as_dict", "as_object"])
def test_an_answer_that_has_the_logits_inside_is_taken_everywhere(teacher, mine):
    """The same student as with the network that answers with logits, by script and in `distill`."""
    for name in ("teacher", teacher):
        plain_inversion.main([*owners_args(plain_inversion, name), "--out", name])
    students = [running.load_classifier(f"{name}/student.pt")[0] for name in ("teacher", teacher)]
    assert equal(*(weights_of(student) for student in students))
    import mine as module
    found = []
    for name in ("teacher", teacher):
        student, (network, data) = module.seeded(module.Net()), getattr(module, name)()
        csd_free = tiny_settings(cudfkd)
        cudfkd.distill(network, student, data, csd_free)
        found.append(weights_of(student))
        assert not network._forward_hooks
    assert equal(*found)


def test_a_view_after_a_convolution_works_in_every_distill(mine):
    """With her networks as they are: no layout is forced on them."""
    import mine as module
    for method in METHODS:
        (teacher, data), student = module.teacher(), module.student()
        before, settings = weights_of(student), tiny_settings(method)
        method.distill(teacher, student, data, settings, **real_images(method, teacher, data, settings))
        assert not equal(before, weights_of(student)), method


@pytest.mark.parametrize("teacher, words", [
    ("alone", "return network, data"), ("soft", "answers with probabilities, whose rows sum to 1"),
    ("bytes_", "x = 255 * (x * std + mean)"), ("seven", "finite logits (N, 7), but with (4, 10)"),
    ("pair", "a DataSpec needs image_shape=(C, H, W)"), ("nothing", "could not be built"),
    ("scores", "answers with a dict with the keys scores"), ("forgotten", "is a `return` missing?"),
    ("broken", "nowhere.pth; line"), ("still", "has no gradient for its images"),
    ("double", "call .float() on it"), ("turned", "(channels, height, width)"),
    ("scripted", "not a torch.nn.Module")])
def test_what_cannot_work_is_refused_in_a_sentence(teacher, words, mine, capsys):
    assert words in refused(dafl, owners_args(dafl, teacher), capsys)


def test_lists_and_tensors_in_a_dataspec_are_taken(mine):
    for name in ("teacher", "lists"):
        rdskd.main([*owners_args(rdskd, name), "--out", name])
    assert rows_of("teacher")[0]["data"] == rows_of("lists")[0]["data"]


def test_a_teacher_without_gradients_is_taken_where_none_is_needed(mine):
    surrogate_kd.main([*owners_args(surrogate_kd, "still"), "--out", "out"])
    assert rows_of("out")[-1]["event"] == "end"
    import mine as module
    (teacher, data), student = module.still(), module.student()
    with pytest.raises(common.BadInput, match="no gradient for its images"):
        csd.distill(teacher, student, data, tiny_settings(csd))


def test_inspect_names_the_methods_that_can_make_such_images(mine, capsys):
    (mine / "wide.py").write_text(MINE.replace("(1, 8, 8)", "(1, 8, 12)").replace("8 * 4 * 4", "8 * 4 * 6"))
    running.main(["--inspect", "wide:teacher"])
    assert "can use it: plain_inversion, rdskd, dafl, cudfkd, deepinversion" in capsys.readouterr().out
    (mine / "tens.py").write_text(MINE.replace("(1, 8, 8)", "(1, 10, 10)").replace("8 * 4 * 4", "8 * 5 * 5"))
    running.main(["--inspect", "tens:teacher"])                # the papers' generators double twice
    assert "can use it: plain_inversion, deepinversion" in capsys.readouterr().out
    assert "return network, DataSpec(...)" in refused(running, ["--inspect", "wide:alone"], capsys)


def test_a_data_set_only_scores_and_must_fit(mine, capsys):
    rdskd.main([*owners_args(rdskd), "--dataset", "digits", "--out", "scored"])
    rdskd.main([*owners_args(rdskd), "--preset", "digits", "--out", "alone"])
    (start, *_, end), (_, *_, other) = rows_of("scored"), rows_of("alone")
    assert start["data"]["mean"] == [0.3] and end["student_acc_last"] is not None is other["student_acc_last"]
    assert end["agreement_drawn"] == other["agreement_drawn"]
    assert equal(*(running.read_classifier(f"{name}/student.pt")["weights"] for name in ("scored", "alone")))
    refusal = refused(rdskd, [*owners_args(rdskd), "--dataset", "mnist", "--preset", "digits"], capsys)
    assert "is for image shape (1, 8, 8), data set mnist has (1, 32, 32)" in refusal


@each(METHODS)
def test_distill_says_in_a_sentence_what_is_wrong(method):
    teacher, student, data = tiny_networks()
    soft = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))
    other = common.build_model("wrn10_1", 7, data.image_shape)
    wrong_data = data._replace(mean=(127.0,), std=(1 / 255,))
    for networks, spec, words in (((teacher, other), data, r"the student does not answer .* \(N, 10\)"),
                                  ((soft, student), data, "the teacher answers with probabilities"),
                                  ((teacher, student), wrong_data, "converts them in its forward")):
        with pytest.raises(common.BadInput, match=words):
            settings = tiny_settings(method)
            method.distill(*networks, spec, settings, **real_images(method, teacher, data, settings))


# ---------------------------------------------------------------------------------------- norms of every kind
@pytest.mark.parametrize("norm", [
    lambda: nn.BatchNorm2d(6), lambda: nn.SyncBatchNorm(6), lambda: torchvision.ops.FrozenBatchNorm2d(6),
    lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(6), nn.Unflatten(2, (8, 8)))],
    ids=["2d", "sync", "frozen", "1d"])
def test_every_layer_with_running_statistics_counts(norm):
    network = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), norm(), nn.ReLU(), nn.Flatten(),
                            nn.Linear(384, 10))
    layer, = common.batchnorms(network, GREY)
    x = torch.randn(5, 1, 8, 8, requires_grad=True)
    with common.frozen(network), common.recorded_statistics([layer]) as seen:
        network(x)
        maps = network[0](x)
    mean, variance = seen[layer]
    near(mean, maps.mean((0, 2, 3))), near(variance, maps.var((0, 2, 3), correction=0))
    variance.sum().backward()
    assert x.grad.abs().sum() > 0
    student = common.build_model("wrn10_1", 10, (1, 8, 8))
    for method in DATA_FREE:
        settings = tiny_settings(method)
        method.distill(network, student, GREY, settings)


def test_statistics_of_vectors_are_taken_and_those_of_single_images_are_not(in_tmp):
    vectors = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    layer, = common.batchnorms(vectors, GREY)
    x = torch.randn(7, 1, 8, 8)
    with common.frozen(vectors), common.recorded_statistics([layer]) as seen:
        vectors(x)
    near(seen[layer][1], x.flatten(1).var(0, correction=0))
    instance = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), *vectors[::2])
    assert common.batchnorms(instance, GREY) == [] and "single images" in common.why_no_batchnorm(instance)
    with pytest.raises(common.BadInput, match="single images"):
        deepinversion.distill(instance, vectors, GREY, tiny_settings(deepinversion))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [
    csd.adversarial_loss, lambda s, t: cudfkd.adversarial_loss(s, t, torch.ones(len(s), dtype=torch.bool))],
    ids=["csd", "cudfkd"])
def test_adversarial_terms_have_a_gradient_where_a_probability_underflows(loss, dtype):
    """The teacher's probability is 0 in float32 as soon as its logits lie about a hundred apart."""
    torch.manual_seed(0)
    student, teacher = (1000 * torch.randn(6, 10)).to(dtype), (1000 * torch.randn(6, 10)).to(dtype)
    student.requires_grad_(), teacher.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite() and value < 0
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all() and student.grad.abs().sum() > 0
    small, other = torch.randn(2, 6, 10).unbind()
    near(loss(small, other), -kl(small, other, 1 if loss is csd.adversarial_loss else 3).mean())


# --------------------------------------------------------------------------------------- a score without data
def test_drawn_pictures_are_always_the_same_fit_the_data_and_disturb_nothing():
    common.drawn_pictures.cache_clear()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    grey, colour = common.drawn_pictures(GREY), common.drawn_pictures(common.DATASETS["cifar10"])
    assert torch.equal(before, torch.get_rng_state())
    assert grey.pixels.shape == (2000, 1, 8, 8) and colour.pixels.shape == (2000, 3, 32, 32)
    assert grey.pixels.dtype == torch.uint8 and len(colour.pixels.flatten(1).unique(dim=0)) == 2000
    common.drawn_pictures.cache_clear()
    assert torch.equal(grey.pixels, common.drawn_pictures(GREY).pixels)


def test_agreement_drawn_is_the_share_of_drawn_pictures_and_costs_no_query(mine):
    dafl.main([*owners_args(dafl), "--out", "out"])
    import mine as module
    (teacher, data), (student, _) = module.teacher(), running.load_classifier("out/student.pt")
    images = common.normalize(common.drawn_pictures(data).pixels / 255, data)
    with torch.no_grad():
        same = (teacher.eval()(images).argmax(1) == student(images).argmax(1)).float().mean().item()
    end = rows_of("out")[-1]
    assert end["agreement_drawn"] == pytest.approx(same, abs=2e-3)
    settings = {**TINY[dafl]}
    assert end["teacher_queries"] == settings["epochs"] * settings["student_steps"] * settings["batch_size"]


def test_a_teacher_that_knows_nothing_is_doubted(mine, teacher_file, capsys):
    dafl.main([*tiny_args(dafl, teacher_file), "--out", "scored"])                 # untrained: 11.7 %
    assert "no better than a guess; were its weights loaded" in capsys.readouterr().out
    (mine / "blind.py").write_text(MINE + textwrap.dedent("""
        def teacher():
            network = Net()
            network.fc.weight.data.zero_()
            network.fc.bias.data = 5 * torch.eye(10)[3]
            return network, data
        """))
    argv = owners_args(dafl)
    argv[argv.index("mine:teacher")] = "blind:teacher"
    dafl.main([*argv, "--out", "blind"])
    assert "the teacher sees class 3 in all drawn pictures" in capsys.readouterr().out
    assert [row["event"] for row in rows_of("blind")][:2] == ["start", "warning"]


def test_a_student_of_leaves_is_marked(mine, capsys):
    for surrogate in ("leaves", "spectrum"):
        surrogate_kd.main([*owners_args(surrogate_kd, surrogate=surrogate), "--out", surrogate])
        said = capsys.readouterr().out
        assert ("of the kind that it was trained on" in said) == (surrogate == "leaves")


# ------------------------------------------------------------------------------------------------ the way out
def test_a_student_is_loaded_exported_and_teaches_again(mine):
    plain_inversion.main([*owners_args(plain_inversion), "--student", "wrn10_1", "--out", "out"])
    student, data = running.load_classifier("out/student.pt")
    images = torch.randn(3, *data.image_shape)
    exported = torch.export.export(student, (images,)).module()
    near(exported(images), student(images))
    assert not student.training and data == common.DataSpec(*data)
    plain_inversion.main([*tiny_args(plain_inversion, "out/student.pt")[2:], "--out", "next"])
    assert rows_of("next")[0]["arguments"]["dataset"] == "none"


@pytest.mark.slow
def test_the_front_pages_own_teacher(tmp_path):
    """Its function, its five commands and its five lines, from the page's own text."""
    page = (ROOT / "README.md").read_text()
    section = page[page.index("## Your own teacher"):]
    section = section[:section.index("\n## ")]
    (function, lines), (commands, compare) = (re.findall(rf"```{kind}\n(.*?)```", section, re.S)
                                      for kind in ("python", "bash"))
    (tmp_path / "mine.py").write_text(function)
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "class MyNet(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 37))\n")
    (tmp_path / "photos").mkdir()
    for number in range(12):
        colour = (20 * number, 255 - 20 * number, 99)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "photos" / f"{number}.png")
    python = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
    short = {"plain_inversion.py": "--bank-rounds 1 --bank-synthesis-steps 1 --synthesis-steps 1".split(),
             "surrogate_kd.py": ["--pool-images", "37"]}

    def run(code, *argv):
        environment = dict(OMP_NUM_THREADS=str(THREADS), PATH="/usr/bin:/bin", PYTHONPATH=str(ROOT))
        result = subprocess.run([sys.executable, *code, *argv], cwd=tmp_path, capture_output=True, text=True,
                                env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout
    weights = "import torch\nfrom mynet import MyNet\ntorch.save(MyNet().state_dict(), 'weights.pth')"
    run(["-c", python + weights])
    found = re.findall(r"^python (\w+\.py) ([^#\n]*)", commands, re.M)
    assert [name for name, _ in found] == ["common.py", *2 * ["plain_inversion.py"], "surrogate_kd.py"]
    for name, flags in found:
        flags = flags.replace("wrn16_1", "wrn10_1").split()    # smaller, so that the test is short
        small = [] if name == "common.py" else ["--epochs", "1", "--batch-size", "8", *short[name]]
        small += ["--student-steps", "2"] if name == "plain_inversion.py" else []
        said = run([ROOT / name], *flags, *small)
        assert "37 classes" in said or "on drawn pictures" in said
    assert (tmp_path / "runs/plain_inversion-mine-001/student.pt").exists()
    script, *flags = compare.replace("runs/one", "runs/plain_inversion-mine-001").replace(
        "runs/other", "runs/surrogate_kd-mine-001").split()[1:]
    shutil.copytree(tmp_path / "photos", tmp_path / "other-photos")
    first, *students = run([ROOT / script], *flags).splitlines()
    assert first.startswith("agreement with mine:teacher on 12 pictures of folder:other-photos")
    assert len(students) == 2
    assert "torch" not in run(["-c", python + lines + "\nprint(classes.shape[0])"])


def test_students_are_compared_on_pictures_of_anything(teacher_file, in_tmp, capsys):
    teacher, _, data = tiny_networks()
    one, other = (common.build_model("wrn10_1", 10, data.image_shape) for _ in range(2))
    one.load_state_dict(teacher.state_dict())                  # a copy agrees always
    for name, student in (("other", other), ("one", one)):
        running.save_classifier(f"runs/{name}/student.pt", student, "wrn10_1", data, "digits",
                                teacher_sha256=running.digest(teacher.state_dict()))
    (in_tmp / "photos").mkdir()
    for number in range(12):
        pixels = (255 * torch.rand(20, 30, 3)).byte().numpy()
        Image.fromarray(pixels).save(f"photos/{number}.png")
    command = ["--compare", str(teacher_file), "runs/other", "runs/one/student.pt", "--pictures"]
    running.main([*command, "folder:photos"])
    said = capsys.readouterr().out
    first, best, worst = said.splitlines()
    assert first == f"agreement with {teacher_file} on 12 pictures of folder:photos, as it is and balanced"
    assert best == "1.0000  1.0000  runs/one/student.pt" and worst.endswith("runs/other/student.pt")
    running.main([*command, "folder:photos"])
    assert capsys.readouterr().out == said                     # always the same pictures
    running.save_classifier("runs/third/student.pt", other, "wrn10_1", data, "digits", teacher_sha256="x")
    running.save_classifier("runs/fourth/student.pt", other, "wrn10_1", data._replace(mean=(0.1,)), "digits",
                            teacher_sha256=running.digest(teacher.state_dict()))
    for argv, words in (([*command, "folder:none"], "no picture in folder none"), (command[:3], "--pictures"),
                        (["--compare", str(teacher_file), "--pictures", "folder:photos"], "its students"),
                        (["--compare", str(teacher_file), "runs/third", "--pictures", "folder:photos"],
                         "no student of"),
                        ([*command[:2], "runs/nobody", *command[4:], "folder:photos"], "no student runs/nob"),
                        ([*command[:3], "runs/fourth", *command[4:], "folder:photos"], "another DataSpec"),
                        ([*command, "photos"], "type --pictures folder:photos")):
        assert words in refused(running, argv, capsys)


# ----------------------------------------------------------------------------------------------- more ways in
def test_images_that_deepinversion_made_are_a_surrogate(teacher_file, in_tmp, capsys):
    deepinversion.main([*tiny_args(deepinversion, teacher_file), "--synthesize-only", "20", "--out", "made"])
    args = [*tiny_args(surrogate_kd, teacher_file), "--out", "out", "--surrogate"]
    surrogate_kd.main([*args, "made/images.pt"])
    pool = running.read_file("checkpoints/toy.made_images_pt-unbalanced-seed0/result.pt", "pool")["result"][0]
    made = torch.load("made/images.pt", weights_only=True)["pixels"]
    assert {*map(tuple, pool.flatten(1).tolist())} <= {*map(tuple, made.flatten(1).tolist())}
    assert rows_of("out")[-1]["event"] == "end" and rows_of("out")[0]["arguments"]["preset"] == "digits-real"
    torch.save({"pixels": torch.ones(3)}, "images.pt")
    for name, words in (("images.pt", "holds no images"), ("nowhere/images.pt", "there is no file")):
        assert words in refused(surrogate_kd, [*args[:-1], "--out", "new", "--surrogate", name], capsys)


def test_folders_of_grey_files_stay_grey(in_tmp):
    for part, label, number in ((part, label, number) for part in ("train", "test") for label in "ab"
                                for number in range(3)):
        path = in_tmp / "grey" / part / label
        path.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 60 * number).save(path / f"{number}.png")
    images, data = common.load_dataset("folder:grey", True)
    assert images.pixels.shape == (6, 1, 8, 8) and data.image_shape == (1, 8, 8) and len(data.mean) == 1
    Image.new("RGB", (8, 8)).save(in_tmp / "grey" / "train" / "a" / "colour.png")
    assert common.load_dataset("folder:grey", True)[0].pixels.shape == (7, 3, 8, 8)
    Image.fromarray(torch.full((8, 8), 999, dtype=torch.uint16).numpy()).save(path / "deep.png")
    with pytest.raises(common.BadInput, match="deep.png has more than 8 bits"):
        common.load_dataset("folder:grey", False)


def test_the_scores_in_distill_need_no_owner(in_tmp):
    """trained() with an untouched network: the check at the start draws no random number of the caller's."""
    one, two = trained(dafl), trained(dafl)
    assert equal(one, two) and save_untrained(in_tmp / "x.pt", "wrn10_1")
