"""The laws of the house, each held by a test."""
import ast
import importlib
import inspect
import math
import re
import runpy
import shlex
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import common
import running
import zskd
from conftest import DATA_FREE, METHODS, ROOT, TINY, dafl, rdskd
from test_methods import each

README, BENCHMARKS, TABLES = ((ROOT / name).read_text() for name in
                              ("README.md", "benchmarks/README.md", "benchmarks/TABLES.md"))
FILES = ["common", "running", *(method.__name__ for method in METHODS)]


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def imported(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def defined(name):
    return [node.name for node in tree_of(name).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


# ------------------------------------------------------------------------------------------- files, imports
def test_a_method_imports_common_and_its_main_running():
    """An algorithm needs common.py alone; running.py is there for main()."""
    assert {path.stem for path in ROOT.glob("*.py")} == {*FILES}
    for name in FILES:
        allowed = {"common": {"running"}, "running": {"common"}}.get(name, {"common", "running"})
        assert {*imported(name)} & {*FILES} == allowed, name
    at_once = [node.module for node in tree_of("common").body if isinstance(node, ast.ImportFrom)]
    assert "running" not in at_once
    for method in METHODS:                                     # distill and its helpers take nothing of it
        tree = tree_of(method.__name__)
        of_main = {"main", "find_pictures", "made_pictures", "self_regulated", "drawer", "save_images"}
        taken = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                 and node.module == "running" for alias in node.names} - {"command_line"}
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in of_main:
                used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                assert not used & taken, (method.__name__, node.name, used & taken)


def source(name):
    return (ROOT / f"{name}.py").read_text()


def notes_of(name):
    """{number: [lines]} of the comments that end a method's file."""
    notes, number = {}, None
    for line in source(name).partition("- notes\n")[2].splitlines():
        begins = re.match(r"# ( ?\d+)\. ", line)
        number = int(begins[1]) if begins else number
        assert line.startswith("#"), f"{name}: after the notes comes {line!r}"
        if number:
            notes.setdefault(number, []).append(line)
    return notes


@each(METHODS)
def test_a_preface_has_35_lines_and_a_note_four_and_what_they_name_exists(method):
    """Flags and names; the code speaks of no note that is not there."""
    name, text = method.__name__, source(method.__name__)
    assert text[:text.index("\nimport ")].count("\n") + 1 <= 35
    notes = notes_of(name)
    assert [*notes] == [*range(1, len(notes) + 1)] and len(notes) > 5
    for number, lines in notes.items():
        assert len(lines) <= 4, number
    flags = {field.replace("_", "-") for field in method.Settings.__dataclass_fields__} | OWN_FLAGS
    prose = "\n".join([method.__doc__, *(line for lines in notes.values() for line in lines)])
    said = {flag.removeprefix("no-") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", prose)}
    assert said <= flags | FOREIGN_FLAGS.get(name, set()), said - flags
    cited = {int(number) for number in re.findall(r"[Nn]otes? (\d+)", text)}
    assert cited <= {*notes}, cited - {*notes}


# Flags that every script has or that are a script's own, and those of other scripts that a file speaks of
OWN_FLAGS = {"dataset", "teacher", "student", "preset", "out", "resume", "precision", "deterministic",
             "threads", "bank", "pool", "generator", "significance", "inspect-only", "synthesize-only",
             "eval-every"}
FOREIGN_FLAGS = {"dafl": {"a"}}


@each(METHODS)
def test_a_preset_is_found_without_following_more_than_one_replace(method):
    """A preset's Settings is a name, a call of Settings, or one replace of a name that is such a call."""
    lines = [node for node in tree_of(method.__name__).body if isinstance(node, ast.Assign)]
    assigned = {node.targets[0].id: node.value for node in lines if isinstance(node.targets[0], ast.Name)}

    def depth(node):
        if isinstance(node, ast.Name):
            return depth(assigned[node.id])
        called = node.func.id
        return {"Settings": lambda: 0, "replace": lambda: 1 + depth(node.args[0])}[called]()
    presets = assigned["PRESETS"]
    assert [ast.literal_eval(key) for key in presets.keys] == [*method.PRESETS]
    for key, value in zip(presets.keys, presets.values):
        assert value.func.id == "Preset" and depth(value.args[3]) <= 1, key.value
    for preset in method.PRESETS.values():
        assert isinstance(preset, common.Preset) and isinstance(preset.settings, method.Settings)
        assert preset.dataset in common.DATASETS or preset.dataset.startswith("folder:")
        for network in (preset.teacher, preset.student):
            assert ":" in network or common.check_model_name(network)


def test_common_and_running_compute_no_distillation_loss():
    trees = (tree_of(name) for name in ("common", "running"))
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call.attr for call in calls if isinstance(call, ast.Attribute)]
    assert not {"kl_div", "mse_loss", "log_softmax"} & {*calls}
    assert calls.count("backward") == 1                        # of a teacher's cross-entropy
    assert not [name for name in defined("common") if re.search("_loss(es)?$", name)]


def test_lines_are_at_most_110_columns_wide_and_those_of_prose_100():
    assert not [f"{path.relative_to(ROOT)}:{number}" for folder in ("", "tests/", "benchmarks/")
                for path in ROOT.glob(folder + "*.py")
                for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    prose = re.sub("```.*?```", "", README + BENCHMARKS, flags=re.S).splitlines()
    assert not [line for line in prose if len(line) > 130 and line[0] != "|" and "](" not in line]


def test_requirements_have_lower_bounds_and_reasons_and_cover_what_is_imported():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+\s+# .+", line) for line in lines)
    known = {line.partition(">")[0] for line in lines} | {"sklearn", "PIL", "numpy", "common", "running"}
    assert {m.partition(".")[0] for n in FILES for m in imported(n)} <= known | sys.stdlib_module_names


# ------------------------------------------------------------------------------------- signatures and losses
@each([*METHODS, zskd])
def test_distill_is_data_free_by_signature_or_takes_data_by_name(method):
    parameters = inspect.signature(method.distill).parameters
    assert [*parameters][:5] == ["teacher", "student", "data", "settings", "run"]
    assert parameters["run"].default is None
    more = list(parameters.values())[5:]
    if method in [*DATA_FREE, zskd]:
        assert {p.name for p in more} <= {"bank", "generator", "pool"} and not any(p.default for p in more)
    else:
        assert all(p.kind is p.KEYWORD_ONLY for p in more) and more[0].default is more[0].empty


def example(name):
    """An argument of a loss, by its name."""
    if name in ("statistics", "running", "wanted"):
        return [(torch.randn(3), torch.rand(3)) for _ in range(2)]
    if name in ("labels", "targets"):
        return torch.arange(8)
    if name in ("temperature", "age"):
        return 2.0
    if name == "agreed":
        return torch.rand(8) > 0.5
    if name in ("losses", "difficulty", "weights"):
        return torch.rand(8)
    return torch.randn(8, 10, *[6, 6] * (name[-3:] in ("map", "ges")))


@each(METHODS)
def test_losses_are_pure_say_their_shapes_and_source_and_work_in_an_empty_file(method):
    """Pasted with the helpers that they call; nothing else of their module is there."""
    functions = {name: value for name, value in vars(method).items() if inspect.isfunction(value)}
    wanted = {name for name in functions if re.search("_loss(es)?$", name)}
    losses = sorted(wanted)
    for _ in range(3):                                         # helpers, and theirs
        wanted |= {name for loss in wanted for name in functions[loss].__code__.co_names if name in functions}
    pasted = dict(torch=torch, F=F, math=math, rearrange=rearrange)
    exec("\n".join(inspect.getsource(functions[name]) for name in wanted), pasted)
    assert losses
    for name in losses:
        signature, text = inspect.signature(functions[name]), " ".join(functions[name].__doc__.split())
        torch.manual_seed(0)
        arguments = [example(p.name) for p in signature.parameters.values() if p.default is p.empty]
        results = [function(*arguments) for function in (functions[name], pasted[name], functions[name])]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), name
        assert results[0].isfinite().all() and not {"settings", "device"} & {*signature.parameters}, name
        shape = re.search(r"-> (a scalar|\(N?'?,\))", text)
        assert shape and re.search(r"\[(code|ours|issues|notes|paper|abstract|CCKD|csd|DataFree)", text), name
        assert results[0].shape == (() if shape[1] == "a scalar" else (8,)), name
        result = text.partition("->")[2][:60]
        least, most = "at least 0" in result, re.search("at most 0|, 0\\]", result)
        assert not least or (results[0] >= 0).all(), name
        assert not most or (results[0] <= 0).all(), name


@each(METHODS)
def test_every_name_under_copy_exists_and_has_a_docstring(method):
    """Names of functions end in (); others have a capital or an underline in them."""
    text = re.search(r"^Copy it\n(.*?)^(Letters|\n)", method.__doc__, re.S | re.M)[1]
    names = {*re.findall(r"(\w+)\(\)", text), *re.findall(r"\b\w+_\w+\b(?!=)", text),
             *re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z0-9]+)+\b", text)} - {"UpsampledConv2d", "BadInput"}
    assert names and hasattr(method, "main")
    # without its decorator and its call deleted, too, the copy does not parse
    main = re.search(r"main\(\)\s+with\s+(the\s+line\s+above\s+it|its\s+decorator)(.*)", text, re.S)
    assert main and "call" in main[2]
    for name in names - {"main"}:
        assert (getattr(method, name, None) or getattr(common, name)).__doc__, name


def test_a_method_is_copied_with_common_alone(tmp_path):
    """As every file says: without its main() and its import from running, which is not there."""
    (tmp_path / "common.py").write_text(source("common"))
    for method in METHODS:
        text = source(method.__name__)
        text = re.sub(r"^from running import (\(.*?\)|[^\n]*)\n", "", text, flags=re.S | re.M)
        text = re.sub(r"^@command_line\ndef main.*?(?=^\S)", "", text, flags=re.S | re.M)
        (tmp_path / f"{method.__name__}.py").write_text(text.replace("    main()\n", "    pass\n"))
    names = [method.__name__ for method in METHODS]
    code = f"""
import importlib, sys, torch
from torch import nn
import common
data = common.DataSpec((3, 12, 12), 5, (0.5,) * 3, (0.25,) * 3)
tiny = {({method.__name__: TINY[method] for method in METHODS})!r}
for name in {names}:
    method = importlib.import_module(name)
    teacher, student = (nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                                      nn.Linear(200, 5)) for _ in range(2))
    more = dict(regulated_kd=dict(train=common.ImageSet(torch.randint(256, (40, 3, 12, 12)).byte(),
                                                        torch.arange(40) % 5), counts=torch.ones(40)),
                surrogate_kd=dict(surrogate=torch.randint(256, (40, 3, 12, 12)).byte(),
                                  pseudo_labels=torch.arange(40) % 5))
    method.distill(teacher, student, data, method.Settings(**tiny[name]), **more.get(name, {{}}))
assert "running" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_dafl_and_rdskd_are_read_side_by_side():
    """One generator, and the same functions in the same order: a diff shows what the second paper changed."""
    def code_of(thing):
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
        return [ast.dump(part) for part in tree.body[bool(ast.get_docstring(tree)):]]
    for name in ("Generator", "kd_loss", "one_hot_loss"):
        assert code_of(getattr(dafl, name)) == code_of(getattr(rdskd, name)), name
    shared = [name for name in defined("dafl") if name in defined("rdskd")]
    assert shared == [name for name in defined("rdskd") if name in shared] and len(shared) >= 7


# ----------------------------------------------------------------------------------------------------- pages
BLOCKS = re.findall(r"```bash\n(.*?)```", README + BENCHMARKS, re.S)
COMMANDS = sorted({line for block in BLOCKS for line in re.findall(r"^python (\S+[.]py.*)", block, re.M)})


def test_the_front_page_keeps_its_limits():
    """Nine headings, one results table of ten rows with one result a cell, paragraphs of 70 words at most."""
    assert len(re.findall("^#+ ", re.sub("```.*?```", "", README, flags=re.S), re.M)) <= 9
    table = re.search("<!-- front.*?-->\n(.*?)<!-- end -->", README, re.S)[1].strip().splitlines()
    assert len(table) - 2 <= 10 and README.count("\n| ---") == 1
    assert all(len(re.findall("±", cell)) <= 1 for row in table for cell in row.split("|"))
    prose = re.sub("```.*?```|<!--.*?-->|^\\|.*$", "", README, flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", prose):
        assert len(re.sub(r"\]\([^)]*\)", "]", paragraph).split()) <= 70, paragraph
    assert len(BENCHMARKS.splitlines()) <= 350


def test_what_the_pages_link_to_is_there():
    for page in (ROOT / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))):
        text = page.read_text()
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        assert links
        for link in links:
            name, _, section = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            if section:
                heads = re.findall(r"^#+ (.*)$", target.read_text().lower(), re.M)
                assert section in {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_pages_parses(command, in_tmp, monkeypatch, capsys):
    """Up to the point where work would start. Scripts of benchmarks/ are there and know --help."""
    script, *argv = shlex.split(command, comments=True)
    if script.startswith("benchmarks/"):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert stop.value.code == 0 and "usage" in capsys.readouterr().out
        return

    def stop(*args, **more):
        raise common.BadInput("parsed")
    module = importlib.import_module(script.removesuffix(".py"))
    cifar10 = common.DATASETS["cifar10"]
    for name in ("set_up_device", "_check_folder"):
        monkeypatch.setattr(running, name, lambda *args: None)
    for place in (running, module):
        file = {"dataset": "cifar10", "arch": "resnet34", "data": cifar10._asdict()}
        monkeypatch.setattr(place, "read_classifier", lambda path: file, raising=False)
    monkeypatch.setattr(running, "from_function", lambda name: (None, cifar10))          # mine:teacher
    monkeypatch.setattr(module, "dataset_spec", lambda options: common.DATASETS.get(options.dataset, cifar10),
                        raising=False)
    monkeypatch.setattr(module, "real_pictures", lambda *args: (1, None, ""), raising=False)
    of_common = "train_teacher", "inspect_network", "compare_students"
    for name in of_common if module is common else ("load_networks",):
        monkeypatch.setattr(running if module is common else module, name, stop)
    with pytest.raises(SystemExit):
        (running if module is common else module).main(argv)
    assert capsys.readouterr().err == "error: parsed\n"


@each(METHODS)
def test_the_figures_of_a_docstring_stand_in_the_tables(method):
    """Exactly, or rounded to one digit after the point."""
    cells = "\n".join(line for line in (README + TABLES).splitlines() if line.startswith("|"))
    exact = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", cells)
    exact += [part for figure in exact for part in figure.split(" ± ")]
    rounded = {" ± ".join(f"{float(part):.1f}" for part in figure.split(" ± ")) for figure in exact}
    said = re.search(r"^Run it\n(.*?)^Copy it", method.__doc__, re.S | re.M)[1]
    figures = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", said)
    assert figures and {*figures} <= {*exact} | rounded, {*figures} - {*exact} - rounded
