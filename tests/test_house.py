"""The laws of the house, each held by a test."""
import ast
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize

import pytest

import csd
import cudfkd
import dafl
import deepinversion
import rdskd
import regulated_kd
import surrogate_kd
import zskd
from conftest import ROOT

# method files and the most lines that each may have
METHODS = {"csd": (csd, 500), "dafl": (dafl, 500), "rdskd": (rdskd, 500), "deepinversion": (deepinversion, 500),
           "cudfkd": (cudfkd, 500), "regulated_kd": (regulated_kd, 500), "surrogate_kd": (surrogate_kd, 650)}
DATA_FREE = sorted(set(METHODS) - {"regulated_kd", "surrogate_kd"})
LIMITS = {"common": 750, "models": 750, "run": 750, **{name: limit for name, (_, limit) in METHODS.items()}}


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def imported(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_method_file_is_in_this_table():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == {"common", "models", "run", *METHODS}


@pytest.mark.parametrize("name", LIMITS)
def test_files_are_short_and_no_method_imports_another(name):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= LIMITS[name]
    assert max(map(len, (ROOT / f"{name}.py").read_text().splitlines())) <= 140
    assert not (set(METHODS) - {name}) & set(imported(name))
    if name == "common":                                       # run.py builds on it; only `python common.py` goes the other way
        assert not any(isinstance(node, ast.ImportFrom) and node.module == "run" for node in tree_of(name).body)


@pytest.mark.parametrize("name", ["common", "models", "run"])
def test_plumbing_computes_no_distillation_loss(name):
    source = (ROOT / f"{name}.py").read_text()
    calls = {node.func.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    assert not calls & {"kl_div", "mse_loss", "log_softmax"} and not re.search(r"def \w+_loss", source)
    assert ("backward" in calls) == (name == "run")            # a teacher's cross-entropy, nothing else


@pytest.mark.parametrize("name", DATA_FREE)
def test_distill_is_data_free_by_signature(name):
    parameters = list(inspect.signature(METHODS[name][0].distill).parameters.values())
    assert [p.name for p in parameters[:5]] == ["teacher", "student", "data", "settings", "run"] and parameters[4].default is None
    assert {p.name for p in parameters[5:]} <= {"bank", "generator", "pool"} and all(p.default is None for p in parameters[5:])
    assert not re.search("load_dataset|ImageSet|DataLoader|torchvision", (ROOT / f"{name}.py").read_text())


def test_a_method_that_uses_data_says_so_in_its_signature():
    for function in (regulated_kd.distill, regulated_kd.train_teacher):
        parameter = inspect.signature(function).parameters["train"]
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty       # has to be typed, by name
    assert [*inspect.signature(regulated_kd.distill).parameters][:5] == ["teacher", "student", "data", "settings", "run"]
    inside = {name for function in (regulated_kd.distill, regulated_kd.train_teacher, regulated_kd.regulated_pass)
              for name in re.findall(r"\w+", inspect.getsource(function))}
    assert not inside & {"load_dataset", "predict"}            # the test set is seen by the log alone


@pytest.mark.parametrize("name", METHODS)
def test_only_main_and_its_helpers_use_the_run_room(name):
    """What comes from run.py is never touched by a loss, a network or distill."""
    tree = tree_of(name)
    from_run = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "run" for alias in node.names}
    free = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if from_run & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}}
    assert free <= {"main", "stored_bank", "stored_generator", "stored_pool", "stored_teacher", "synthesize_only"}


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_pure_functions_of_tensors_with_a_full_docstring(name):
    losses = [node for node in tree_of(name).body if isinstance(node, ast.FunctionDef) and node.name.endswith("_loss")]
    assert losses
    for loss in losses:
        text = ast.get_docstring(loss)
        assert "-> ()" in text and ("[code" in text or "[inferred" in text), loss.name           # shapes and source
        assert not {"settings", "run", "device"} & {n.id for n in ast.walk(loss) if isinstance(n, ast.Name)}, loss.name


@pytest.mark.parametrize("name", METHODS)
def test_comments_and_docstrings_carry_their_share(name):
    """At least 30 % of a method's non-blank lines are comment, docstring or end in a comment."""
    source = (ROOT / f"{name}.py").read_text()
    lines = {i + 1 for i, line in enumerate(source.splitlines()) if line.strip()}
    said = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            said |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert len(said & lines) / len(lines) >= 0.30, len(said & lines) / len(lines)


@pytest.mark.parametrize("name", METHODS)
def test_every_name_under_copy_exists_and_has_a_docstring(name):
    module = METHODS[name][0]
    copy = re.search(r"^Copy\s+(.*?)^\w", module.__doc__, re.S | re.M)[1]
    names = re.findall(r"\w+", copy)
    assert len(names) > 5
    for name in names:
        assert getattr(module, name).__doc__, name


@pytest.mark.parametrize("module", [module for module, _ in METHODS.values()], ids=lambda module: module.__name__)
def test_losses_pasted_into_an_empty_file_work(module, tmp_path):
    """With nothing but torch and einops, as a copier does it."""
    wanted = r"\w+_loss|\w+_losses|curriculum_\w+|rotation\w*|increment_penalty|neighbour_differences"
    call = {cudfkd: "curriculum_loss(kd_losses(torch.ones(2, 3), torch.eye(3)[:2], 4.0), 2.0)",
            regulated_kd: "reduced_loss(kd_losses(torch.ones(2, 3), torch.eye(3)[:2], torch.arange(2), 4.0))"}.get(
                module, "kd_loss(torch.ones(2, 3), torch.eye(3)[:2], 4.0)")
    losses = [inspect.getsource(function) for name, function in vars(module).items() if re.fullmatch(wanted, name)]
    code = ("import math\nimport torch\nimport torch.nn.functional as F\nfrom einops import rearrange\n" + "\n".join(losses)
            + f"\nprint({call}.item())\n")
    (tmp_path / "mine.py").write_text(code)
    result = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and float(result.stdout) > 0, result.stderr


def test_generators_of_dafl_and_rdskd_are_one_and_their_files_are_read_side_by_side():
    """The same order and the same words, so that a diff of the two files shows what the papers changed."""
    assert inspect.getsource(dafl.Generator.__init__) == inspect.getsource(rdskd.Generator.__init__)
    for name in ("kd_loss", "one_hot_loss"):
        assert inspect.getsource(getattr(dafl, name)).split('"""')[2] == inspect.getsource(getattr(rdskd, name)).split('"""')[2]
    defined = {name: [node.name for node in tree_of(name).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))] for name in ("dafl", "rdskd")}
    shared = [name for name in defined["dafl"] if name in defined["rdskd"]]
    assert shared == [name for name in defined["rdskd"] if name in defined["dafl"]] and len(shared) >= 7


def test_the_rival_in_benchmarks_keeps_the_laws_that_matter():
    parameters = list(inspect.signature(zskd.distill).parameters)
    source = (ROOT / "benchmarks" / "zskd.py").read_text()
    for name in re.findall(r"\w+", re.search(r"^Copy\s+(.*?)^\w", zskd.__doc__, re.S | re.M)[1]):
        assert getattr(zskd, name).__doc__, name
    assert parameters == ["teacher", "student", "data", "settings", "run"] and not re.search("load_dataset|ImageSet|DataLoader", source)


def test_the_readmes_own_teacher_example_runs(tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    (tmp_path / "example.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + block)
    result = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len([line for line in block.splitlines() if line.strip()]) <= 14


def test_the_readmes_results_come_from_the_committed_logs():
    """The block between the markers is, word for word, what benchmarks/table.py prints."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- results: python benchmarks/table.py -->\n(.*?)<!-- end -->", text, re.S)[1]
    printed = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "table.py")], capture_output=True, text=True, check=True).stdout
    assert block.strip() == printed.strip()


def test_the_docstrings_figures_are_in_the_readmes_table():
    for module, _ in METHODS.values():
        table = "\n".join(re.findall(rf"^\| {module.__name__}, .*", (ROOT / "README.md").read_text(), re.M))
        said = re.search(r"^Run(.*?)^Copy", module.__doc__, re.S | re.M)[1]
        figures = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", said)
        assert figures and all(figure in table for figure in figures), figures


def test_the_methods_table_lists_the_files_that_are_there():
    listed = re.findall(r"^\| \[`(\w+)\.py`\]", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(METHODS)


def test_requirements_have_lower_bounds_and_reasons():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert re.fullmatch(r"[\w-]+>=[\d.]+\s+# .+", line), line


def test_committed_logs_are_whole():
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows and all("event" in row or "variant" in row for row in rows), path
        if "event" in rows[0]:
            assert rows[0]["event"] == "start" and rows[-1]["event"] == "end", path
