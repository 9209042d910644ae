"""csd.distill on tiny networks: who learns, who must not, what is left behind, and that it sees no data."""
import copy
import hashlib

import pytest
import torch
import torch.nn as nn

import common
import csd
import models
from conftest import tiny_networks, tiny_settings


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(weights, model):
    return all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())


class Recorder:
    """A run that keeps the rows, and looks at the state at every tick."""
    def __init__(self, look=None):
        self.rows, self.look = [], look

    def restore(self, state):
        self.state = state

    def tick(self, state):
        if self.look:
            self.look(state)

    def report(self, **row):
        self.rows.append(row)


class ForeignTeacher(nn.Module):
    """No name, no last_map, no width in common with common.py's models."""
    def __init__(self, batch_norm=True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12) if batch_norm else nn.Identity(), nn.ReLU())
        self.pool, self.out = nn.AdaptiveMaxPool2d(1), nn.Linear(12, 10)

    def forward(self, x):
        return self.out(self.pool(self.body(x)).flatten(1))


def test_distill_trains_the_student_and_leaves_the_teacher_as_it_was():
    teacher, student, data = tiny_networks()
    teacher.train()                                            # also its mode must come back
    next(teacher.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in teacher.parameters()]
    teacher_before, student_before = weights_of(teacher), weights_of(student)
    recorder = Recorder()
    bank = csd.distill(teacher, student, data, tiny_settings(), recorder)
    assert same(teacher_before, teacher) and teacher.training and [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters())
    assert not same(student_before, student)
    for network in (teacher, student):
        assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in network.modules())
    epochs = [row for row in recorder.rows if "epoch" in row]
    assert len(epochs) == 2 and bank.count == 40
    for term in ("loss_oh", "loss_bn", "loss_csd", "loss_kd", "loss_ce", "loss_feature", "loss_head"):
        assert all(row[term] not in (0.0, None) for row in epochs), term
    assert recorder.state["student_steps"] == 6 and recorder.state["images_synthesized"] == 40
    assert recorder.state["teacher_queries"] == 2 * 2 * 10 + 2 * 2 * 10 + 6 * 8      # stage 1, stage 2, distillation


def test_distill_is_a_function_of_its_seed_and_draws_from_no_global_stream():
    results = []
    for seed, disturb in ((0, False), (0, True), (1, False)):
        torch.manual_seed(1234 if disturb else 0)
        teacher, student, data = tiny_networks()
        before = torch.get_rng_state()
        csd.distill(teacher, student, data, tiny_settings(seed=seed))
        assert torch.equal(before, torch.get_rng_state())
        results.append(weights_of(student))
    assert same(results[0], _module_of(results[1])) and not same(results[0], _module_of(results[2]))


def _module_of(weights):
    student = tiny_networks()[1]
    student.load_state_dict(weights)
    return student


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_teacher_that_is_not_from_common(batch_norm):
    """Without a last map the feature term is off; without BN layers the BN term is."""
    _, student, data = tiny_networks()
    recorder = Recorder()
    csd.distill(ForeignTeacher(batch_norm), student, data, tiny_settings(), recorder)
    row = recorder.rows[-1]
    assert row["loss_feature"] == 0 and (row["loss_bn"] > 0) == batch_norm and row["loss_kd"] > 0
    notes = [row["text"] for row in recorder.rows if row.get("event") == "note"]
    recorder = Recorder()
    csd.distill(ForeignTeacher(batch_norm), student, data, tiny_settings(teacher_last_map="pool"), recorder)
    assert recorder.rows[-1]["loss_feature"] > 0
    assert len(notes) == 2 - batch_norm and "the feature term is off" in notes[0]


def test_a_student_that_is_not_from_common_and_other_shapes():
    """CIFAR-shaped, ResNet teacher, half-width foreign student with a smaller last map."""
    data = common.DataSpec((3, 16, 16), 5, (0.5,) * 3, (0.5,) * 3, crop=2, flip=True)
    teacher = models.build_model("resnet18", 5, data.image_shape)
    student = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    before, recorder = weights_of(student), Recorder()
    csd.distill(teacher, student, data, tiny_settings(student_last_map="3"), recorder)
    assert not same(before, student) and recorder.rows[-1]["loss_feature"] > 0


def test_hooks_are_gone_after_an_exception():
    teacher, student, data = tiny_networks()
    weights = weights_of(teacher)
    for when in ("synthesis_step", "distillation_step"):
        def stop(state):
            if state[when] == 2:
                raise KeyError
        with pytest.raises(KeyError):
            csd.distill(teacher, student, data, tiny_settings(), Recorder(stop))
        for network in (teacher, student):
            assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in network.modules())
        assert same(weights, teacher) and all(p.requires_grad for p in [*teacher.parameters(), *student.parameters()])


def test_who_learns_in_which_phase():
    """Synthesis moves generator and latents only; a distillation step moves student, regressor and head, never the generator."""
    teacher, student, data = tiny_networks()
    seen = {}

    def fingerprint(state, key):
        values = [state[key]] if key == "z" else [v for name, v in state[key].state_dict().items() if "num_batches" not in name]
        return hashlib.sha256(b"".join(v.detach().contiguous().numpy().tobytes() for v in values)).hexdigest()

    def look(state):
        now = {key: fingerprint(state, key) for key in ("generator", "z", "student", "regressor", "head")}
        if seen:
            moved = {key for key in now if now[key] != seen["before"][key]}
            if state["distillation_step"] == 0 and state["synthesis_step"] > 1:
                assert moved == {"generator", "z"}
            elif state["distillation_step"] > 1:
                assert moved == {"student", "regressor", "head"}
        seen["before"] = now
    csd.distill(teacher, student, data, tiny_settings(synthesis_steps=3), Recorder(look))


def test_the_student_never_learns_from_the_heads_task_and_its_bn_never_sees_rotations():
    """With the head on or off (everything else equal) the student's first update is the same, its BN statistics too."""
    students = []
    for lr_head in (0.1, 1e-12):
        teacher, student, data = tiny_networks()
        csd.distill(teacher, student, data, tiny_settings(epochs=1, lr_head=lr_head, csd=1e-30))
        students.append(student)
    assert same(weights_of(students[0]), students[1])
    teacher, student, data = tiny_networks()
    tracked = []
    csd.distill(teacher, student, data, tiny_settings(epochs=1), Recorder(lambda state: tracked.append(student.bn.num_batches_tracked.item())))
    assert tracked == [0, 0, 1, 2, 3]


def test_the_csd_term_changes_the_images():
    images = {}
    for name, changes in (("csd", {}), ("none", {"csd": 0.0}), ("adversarial", {"csd": 0.0, "adversarial": 1.0}), ("raw", {"raw_head": True})):
        teacher, student, data = tiny_networks()
        recorder = Recorder()
        images[name] = csd.distill(teacher, student, data, tiny_settings(epochs=1, **changes), recorder).pixels[-10:]
        row = recorder.rows[-1]
        assert (row["loss_csd"] != 0) == (row["loss_head"] != 0) == (name in ("csd", "raw")) and (row["loss_adversarial"] != 0) == (name == "adversarial")
    for name in ("none", "adversarial", "raw"):
        assert not torch.equal(images["csd"], images[name]), name
    assert not torch.equal(images["none"], images["adversarial"])


def test_synthesis_keeps_the_best_batch_as_a_copy():
    """The best pixels are those of the step with the least loss, and do not move when the generator does."""
    teacher, _, data = tiny_networks()
    settings = tiny_settings(lr_generator=0.5)                 # so large a rate that the last step is not the best one
    rng = torch.Generator().manual_seed(0)
    state = csd.synthesis_state(data, settings, torch.device("cpu"), rng)
    history, losses, before = [], [], {}

    def look(state):
        history.append(state["best_pixels"].clone())
        losses.append(state["best_loss"].item())
    csd.synthesize(state, teacher, data, settings, 8, run=Recorder(look))
    assert losses == sorted(losses, reverse=True) and len(set(losses)) < 8
    for (loss, pixels), (next_loss, next_pixels) in zip(zip(losses, history), zip(losses[1:], history[1:])):
        assert torch.equal(pixels, next_pixels) == (loss == next_loss)
    assert before == {}


def test_teachers_logits_reach_the_generator():
    """If the teacher were replaced by zeros, the images would be others."""
    images = []
    for scale in (1.0, 0.0):
        teacher, _, data = tiny_networks()
        with torch.no_grad():
            teacher.fc.weight.mul_(scale), teacher.fc.bias.mul_(scale)
        images.append(csd.synthesize_bank(teacher, data, tiny_settings()).pixels)
    assert not torch.equal(*images)


def test_the_head_is_drawn_anew_and_keeps_its_momentum_unless_told():
    for fresh in (False, True):
        teacher, student, data = tiny_networks()
        recorder, momenta = Recorder(), []

        def look(state):
            if state["distillation_step"] == 1:                # after the first head step of the round
                buffers = state["head_optimizer"].state.values()
                gradients = [p.grad + 1e-4 * p for p in state["head"].parameters()]
                momenta.append(sum((buffer["momentum_buffer"] - gradient).abs().sum().item() for buffer, gradient in zip(buffers, gradients)))
            assert all(m.abs().max() < 0.15 for m in state["head"].state_dict().values()) or state["epoch"] == 0
        recorder.look = look
        csd.distill(teacher, student, data, tiny_settings(lr_head=1e-9, fresh_head_optimizer=fresh), recorder)
        assert momenta[0] < 1e-2 and (momenta[1] < 1e-2) == fresh     # a fresh buffer equals the gradient (and weight decay)


def test_bank_counts_shows_and_saves_only_what_is_new():
    bank = csd.ImageBank((1, 2, 2), 4, "cpu")
    bank.add(torch.rand(4, 1, 2, 2), torch.tensor([0, 0, 1, 1]))
    bank = bank.with_room(2)
    bank.add(torch.ones(2, 1, 2, 2), torch.tensor([1, 1]))
    state = bank.state_dict()
    assert len(state["labels"]) == 2
    shown = common.newest_by_class(bank.pixels, bank.labels, 3, each=3)
    assert shown.shape == (3, 3, 1, 2, 2) and shown[1, -1].min() == 255 and shown[2].max() == 0
    pixels, labels = bank.take(torch.tensor([5, 0]))
    assert pixels[0].min() == 1.0 and labels.tolist() == [1, 0] and pixels.dtype == torch.float32
    other = csd.ImageBank((1, 2, 2), 4, "cpu")
    other.add(bank.pixels[:4], bank.labels[:4])
    other = other.with_room(2)
    other.load_state_dict(state)
    state["sha256"] = "another bank"
    with pytest.raises(common.BadInput, match="stage-1 bank is not the one"):
        other.load_state_dict(state)
    assert torch.equal(other.pixels, bank.pixels) and torch.equal(other.labels, bank.labels) and other.count == 6


def test_a_collapse_is_reported_and_the_run_goes_on(monkeypatch):
    teacher, student, data = tiny_networks()
    monkeypatch.setattr(csd.Generator, "forward", lambda self, z: 0.5 + 0 * self.layers(z))
    recorder = Recorder()
    csd.distill(teacher, student, data, tiny_settings(), recorder)
    assert [row.get("event") for row in recorder.rows].count("collapse") == 2 and recorder.rows[-1]["epoch"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named():
    teacher, student, data = tiny_networks()
    with pytest.raises(FloatingPointError, match="loss_kd became nan at step 1"):
        csd.distill(teacher, student, data, tiny_settings(lr_student=float("inf")))


def test_distill_sees_no_data(monkeypatch):
    """Every way to real images raises while it runs."""
    def forbidden(*args, **kwargs):
        raise AssertionError("distill asked for data")
    for name in ("load_dataset", "_read_torchvision", "_read_folder", "predict"):
        monkeypatch.setattr(common, name, forbidden)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", forbidden)
    teacher, student, data = tiny_networks()
    assert not any(torch.is_tensor(field) for field in data)
    csd.distill(teacher, student, data, tiny_settings())


def test_networks_have_the_published_sizes_and_the_right_range():
    count = lambda model: sum(p.numel() for p in model.parameters())                       # noqa: E731
    assert count(csd.Generator(256, (3, 32, 32))) == 2_328_899
    assert count(csd.Regressor(64, 128, 8)) == 640_000 and count(csd.Regressor(128, 128, 8)) == 656_384
    assert count(csd.Regressor(512, 512, 4)) == 10_489_856
    pixels = csd.Generator(6, (1, 8, 8))(torch.randn(4, 6))
    assert pixels.shape == (4, 1, 8, 8) and 0 < pixels.min() and pixels.max() < 1
    assert torch.allclose(csd.AuxiliaryHead(64, 10)(torch.randn(3, 64)).norm(dim=1), torch.ones(3))
    assert csd.Regressor(8, 16, 4)(torch.randn(2, 8, 8, 8)).shape == (2, 16, 4, 4)
    with pytest.raises(common.BadInput, match="multiple of 4"):
        csd.Generator(6, (1, 10, 10))


def test_reinitialize_draws_what_the_authors_draw():
    generator = csd.Generator(256, (3, 32, 32))
    old = copy.deepcopy(generator.state_dict())
    csd.reinitialize(generator, torch.Generator().manual_seed(0))
    layers = generator.layers
    assert layers[0].weight.std().item() == pytest.approx(0.02, rel=0.02) and layers[0].weight.mean().abs() < 1e-3
    assert layers[2].weight.mean().item() == pytest.approx(1, abs=0.01) and layers[2].weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert layers[0].bias.abs().max() == 0 and layers[2].bias.abs().max() == 0
    assert not torch.equal(old["layers.0.weight"], layers[0].weight)


@pytest.mark.parametrize("precision, compile", [("bf16", False), ("fp32", True)])
def test_other_ways_to_compute_give_about_the_same(precision, compile):
    from run import compile_networks
    results = []
    for change in (False, True):
        teacher, student, data = tiny_networks()
        if change and compile:
            torch._dynamo.reset()
            compile_networks(teacher, student, backend="eager")      # the tracing is what could go wrong with hooks
        recorder = Recorder()
        csd.distill(teacher, student, data, tiny_settings(epochs=1, precision=precision if change else "fp32"), recorder)
        results.append({key: value for key, value in recorder.rows[-1].items() if key.startswith("loss_")})
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, rel=1e-4 if compile else 0.1, abs=1e-4 if compile else 0.05), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distill_on_a_gpu(precision):
    teacher, student, data = tiny_networks()
    before = weights_of(student)
    csd.distill(teacher.cuda(), student.cuda(), data, tiny_settings(precision=precision))
    assert not same(before, student.cpu())


@pytest.mark.parametrize("weight", ["kd", "ce", "feature"])
def test_every_term_of_the_students_loss_reaches_the_student(weight):
    """distill's own sum: a term that was dropped from it would make its weight change nothing."""
    students = []
    for changes in ({}, {weight: 0.0}):
        teacher, student, data = tiny_networks()
        csd.distill(teacher, student, data, tiny_settings(epochs=1, **changes))
        students.append(weights_of(student))
    assert not same(students[0], _module_of(students[1]))


@pytest.mark.parametrize("weight", ["oh", "bn"])
def test_every_term_of_the_generators_loss_reaches_the_images(weight):
    banks = []
    for changes in ({}, {weight: 0.0}):
        teacher, _, data = tiny_networks()
        banks.append(csd.synthesize_bank(teacher, data, tiny_settings(**changes)).pixels)
    assert not torch.equal(*banks)


def test_the_student_learns_from_this_teacher_and_not_from_itself():
    """The same bank and seed, KL alone: another teacher gives another student, and the student is no teacher of its own."""
    _, _, data = tiny_networks()
    bank = csd.synthesize_bank(tiny_networks()[0], data, tiny_settings())
    students = []
    for shift in (0.0, 5.0):
        teacher, student, _ = tiny_networks()
        with torch.no_grad():
            teacher.fc.bias[3] += shift
        csd.distill(teacher, student, data, tiny_settings(epochs=1, csd=0.0, ce=0.0, feature=0.0, oh=0.0, bn=0.0, weight_decay=0.0), bank=bank)
        students.append(weights_of(student))
    untouched = weights_of(tiny_networks()[1])["fc.bias"]
    assert torch.allclose(students[0]["fc.bias"], untouched, atol=0.5) and students[1]["fc.bias"].argmax() == 3
    assert not same(students[0], _module_of(students[1]))
