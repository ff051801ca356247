"""The rules of the house that a program can check, by reading k2/ as syntax trees: nothing here runs the code."""

import ast
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A file imports only from files above it. The two faces, __init__ and __main__, stand apart.
ORDER = """config reference products quantization norm rope embedding kv_cache attention router expert moe decoder model ceilings checkpoint synthetic interrupts
    reading compiled slots offload tokenizer sampling generation chat reply grammar constraint tools terminal part inspection needs machine plan
    published hub download layer_check recording compare trace trace_page routes bench beside training/muonclip training/corpus training/evaluation training/curves
    training/fused training/pretraining training/recipe training/facts training/experiments training/speed mask_bench product_bench""".split()
FACES = ("__init__", "__main__", "training/__init__")
# Each third-party package and the files that may import it; torch and numpy are everywhere but where a test below says otherwise.
HOMES = {
    "huggingface_hub": ["hub"], "jinja2": ["chat"], "matplotlib": ["training/curves"], "safetensors": ["checkpoint"],
    "tokenizers": ["tokenizer"], "transformers": ["beside", "compare", "training/speed"],
}  # fmt: skip
# Tests of more than one module, or of none.
OTHER_TESTS = """properties house command_line bad_input mini lessons hunt exam released_layout mutants hostile_checkpoints site translation pretended_gpu
    oracle_transformers oracle_tiktoken oracle_chat oracle_reply oracle_constraint""".split()
BRANCHES = (ast.If, ast.IfExp, ast.Match, ast.While)


def stem(path: Path) -> str:
    """k2/training/corpus.py is training/corpus."""
    return path.relative_to(ROOT / "k2").with_suffix("").as_posix()


FILES = {stem(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "k2").rglob("*.py"))}


def functions(tree):
    """Every function and method of a file, nested ones included."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def imported_modules(name: str, tree) -> list[str]:
    """Dotted names of what a file imports, relative ones made absolute: `from ..model import K2` is k2.model."""
    package = ["k2", *name.split("/")[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            # `from . import reference` names modules; `from .model import K2` names one module.
            found += [f"{base}.{alias.name}" for alias in node.names] if node.module is None or base in ("k2", "k2.training") else [base]
    return found


def code_lines(function) -> int:
    """Lines that hold code: no docstring, no blank line, no comment."""
    documented = isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant)
    body = function.body[1:] if documented else function.body
    lines = set(range(function.lineno, function.body[0].lineno))
    for statement in body:
        lines |= {line for node in ast.walk(statement) if hasattr(node, "lineno") for line in (node.lineno, node.end_lineno)}
    return len(lines)


# ---- imports ----


def test_the_list_names_every_file():
    assert sorted([*ORDER, *FACES]) == sorted(FILES)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_above_it(name):
    above = {f"k2.{other.replace('/', '.')}" for other in ORDER[: ORDER.index(name)]}
    own = [module for module in imported_modules(name, FILES[name]) if module.split(".")[0] == "k2"]
    assert set(own) <= above, f"k2/{name}.py imports {sorted(set(own) - above)}"


def test_the_import_reader_sees_upward_imports():
    tree = ast.parse("from ..model import K2\nfrom . import corpus\nimport k2.bench\nfrom .. import config\ndef f():\n    from .muonclip import MuonClip")
    assert imported_modules("training/x", tree) == ["k2.model", "k2.training.corpus", "k2.bench", "k2.config", "k2.training.muonclip"]


def test_the_reference_imports_numpy_and_the_config_only():
    assert set(imported_modules("reference", FILES["reference"])) == {"numpy", "k2.config"}


def test_each_third_party_package_has_one_home():
    for name, tree in FILES.items():
        packages = {module.split(".")[0] for module in imported_modules(name, tree)} - set(sys.stdlib_module_names) - {"k2", "torch", "numpy"}
        assert all(name in HOMES.get(package, []) for package in packages), f"k2/{name}.py imports {sorted(packages)}; homes: {HOMES}"


def test_every_package_of_requirements_is_used_or_has_its_reason():
    required = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")}
    assert required == {"torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "pytest", "matplotlib"}
    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in pinned), pinned


# ---- size and shape ----


def test_no_function_is_longer_than_40_lines_and_the_median_is_at_most_12():
    lengths = {f"k2/{name}.py::{f.name}": code_lines(f) for name, tree in FILES.items() for f in functions(tree)}
    longest = max(lengths, key=lengths.get)
    assert lengths[longest] <= 40, f"{longest} has {lengths[longest]} lines of code"
    assert median(lengths.values()) <= 12, f"median {median(lengths.values())} of {len(lengths)} functions"


def test_code_lines_leaves_out_docstrings_comments_and_blanks():
    tree = ast.parse('def f(\n    a,\n):\n    """Doc,\n    long."""\n    # why\n\n    b = (\n        a\n    )\n    return b\n')
    assert code_lines(functions(tree)[0]) == 7


def test_all_forwards_together_branch_at_most_three_times_and_never_on_the_config():
    branches = []
    for name, tree in FILES.items():
        for function in functions(tree):
            if function.name == "forward":
                branches += [(name, ast.unparse(node.test if hasattr(node, "test") else node.subject)) for node in ast.walk(function) if isinstance(node, BRANCHES)]
    assert len(branches) <= 3, f"{len(branches)} branches in all forwards: {branches}"
    assert not [b for b in branches if "config" in b[1] or b[1].startswith("c.") or " c." in b[1]], branches


def test_every_layer_file_has_at_most_150_lines_of_code():
    for name in ORDER[ORDER.index("norm") : ORDER.index("model") + 1]:
        source = (ROOT / "k2" / f"{name}.py").read_text(encoding="utf-8")
        docs = sum(len(ast.get_docstring(node, clean=False).splitlines()) for node in ast.walk(FILES[name])
                   if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node))  # fmt: skip
        code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(code) - docs <= 150, f"k2/{name}.py: {len(code) - docs} lines of code"


# ---- words ----


@pytest.mark.parametrize("name", FILES)
def test_every_file_and_public_name_has_a_docstring(name):
    tree = FILES[name]
    assert ast.get_docstring(tree), f"k2/{name}.py has no docstring"
    owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner in owners:
        for node in owner.body:
            public = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
            # forward's contract is its class's: x in, y out.
            assert not public or node.name == "forward" or ast.get_docstring(node), f"k2/{name}.py: {node.name} has no docstring"


@pytest.mark.parametrize("name", FILES)
def test_no_line_is_left_commented_out_and_none_asks_to_be_done_later(name):
    for number, line in enumerate((ROOT / "k2" / f"{name}.py").read_text(encoding="utf-8").splitlines(), 1):
        comment = line.strip()
        if comment.startswith("#"):
            words = comment.lstrip("# ")
            assert not words.startswith(("TODO", "FIXME", "XXX")), f"k2/{name}.py:{number}: {comment}"
            assert not words.endswith((":", "(", "[", ",)")) or " " in words.rstrip(":([,)"), f"k2/{name}.py:{number}: {comment}"
            assert not words.startswith(("return ", "import ", "def ", "self.")), f"k2/{name}.py:{number}: {comment}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_keeps_mutable_state(name):
    for node in FILES[name].body:
        value = getattr(node, "value", None)
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or value is None:
            continue
        empty = isinstance(value, (ast.List, ast.Dict)) and not getattr(value, "elts", getattr(value, "keys", None))
        made = isinstance(value, ast.Call) and ast.unparse(value.func) in ("list", "dict", "set", "defaultdict", "collections.defaultdict", "deque")
        assert not empty and not made, f"k2/{name}.py:{node.lineno}: {ast.unparse(node)} is state that every caller shares"
    for node in ast.walk(FILES[name]):
        assert not isinstance(node, ast.Global), f"k2/{name}.py:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("name", FILES)
def test_no_function_takes_keywords_blindly(name):
    for function in functions(FILES[name]):
        assert function.args.kwarg is None, f"k2/{name}.py:{function.lineno}: {function.name} takes **{function.args.kwarg.arg}"
        mutable = [d for d in [*function.args.defaults, *function.args.kw_defaults] if isinstance(d, (ast.List, ast.Dict, ast.Set))]
        assert not mutable, f"k2/{name}.py:{function.lineno}: {function.name} has a mutable default"


# ---- tests and names ----


def test_every_test_file_has_its_module():
    stems = {name.split("/")[-1] for name in FILES}
    strangers = [p.name for p in (ROOT / "tests").glob("test_*.py") if p.stem.removeprefix("test_") not in {*stems, *OTHER_TESTS}]
    assert not strangers, f"{strangers}: name them after a module of k2/, or list them here"


def test_every_module_has_its_test_file():
    needs_none = ("training/evaluation", "training/speed")  # they measure, and the figures they print are their proof
    missing = [name for name in ORDER if name not in needs_none and not (ROOT / "tests" / f"test_{name.split('/')[-1]}.py").is_file()]
    assert not missing, f"no test file for {missing}"


def test_the_public_face_is_a_bakers_dozen_of_names_at_most():
    import k2

    assert len(k2.__all__) <= 13 and all(hasattr(k2, name) for name in k2.__all__)
