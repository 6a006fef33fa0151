"""What holds for the whole repository, and would drift without a test."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import dalle_dist

ROOT = Path(__file__).parents[1]
FLOORS = [
    ["dalle_kernels"],
    ["errors", "choices", "stages", "paths"],
    ["storage"],
    ["config", "presets"],
    ["distributed"],
    ["checkpoint.formats"],
    ["text_tokenizer"],
    ["dvae"],
    ["image_tokenizer"],
    ["precision"],
    ["gradients"],
    ["transformer"],
    ["optim"],
    ["data"],
    ["engine.interface"],
    ["engine"],
    ["testing"],
    ["checkpoint"],
    ["interop"],
    ["clip"],
    ["generate"],
    ["serve"],
    ["metrics"],
    ["evaluation"],
    ["plan"],
    ["watch"],
    ["train"],
    ["report"],
    ["evaluate"],
    ["doctor"],
    ["overlap"],
    ["conversion"],
    ["jobs"],
    ["cli"],
    ["__main__"],
]
# What happens to gradients is a matter of torch alone.
GRADIENTS_MAY_USE = ("errors", "choices", "distributed", "precision", "gradients")
FRONT_PAGE, VERSION = ROOT / "dalle_dist/__init__.py", "dalle_dist.__version__"
PACKAGE = sorted((ROOT / "dalle_dist").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
MAY_IMPORT_DEEPSPEED = ("engine/deepspeed/", "testing.py")


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(module):
    """Number of a module's floor; a longer name in the list wins over a shorter one."""
    if module.split(".")[0] == "dalle_kernels":
        return 0
    inside = module.removeprefix("dalle_dist.")
    found = [
        (len(room), number)
        for number, rooms in enumerate(FLOORS)
        for room in rooms
        if inside == room or inside.startswith(room + ".")
    ]
    return max(found)[1]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_downwards(path):
    if path.name == "setup.py":
        assert not [m for m in imports(path) if m.startswith("dalle_dist")]
        return
    if path == FRONT_PAGE:  # names rooms of every floor, and none of the rooms may go through it
        return
    kernels = "kernels" in path.relative_to(ROOT).parts
    own = 0 if kernels else floor(name_of(path))
    modules = {m for m in imports(path) if re.match(r"dalle_(dist|kernels)\.", m)}
    # `from dalle_dist import storage` names the room on the way to the file.
    files = {
        m for m in modules if _is_module(m) and not any(o.startswith(m + ".") for o in modules)
    }
    above = {m for m in files if floor(m) > own}
    above |= modules & {f"dalle_dist.{name}" for name in dalle_dist.__all__} - {VERSION}
    assert not above, f"{name_of(path)} imports from a higher floor: {sorted(above)}"


@pytest.mark.parametrize("path", [p for p in PACKAGE if "gradients" in p.parts], ids=name_of)
def test_gradients_know_nothing_of_the_config_or_the_model(path):
    used = {m.split(".")[1] for m in imports(path) if m.startswith("dalle_dist.")}
    assert used <= set(GRADIENTS_MAY_USE)


def imported_at_once(path):
    """Modules that importing this one imports: neither for type checkers nor inside functions."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from {m for m in inner if _is_module(m)} or {node.module}


def test_no_modules_import_one_another_in_a_circle():
    graph = {}
    for path in PACKAGE + sorted((ROOT / "benchmarks").glob("*.py")):
        name = name_of(path).removeprefix("kernels.")
        graph[name] = {m for m in imported_at_once(path) if _is_module(m) and m != name}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done and name in graph:
            open_.append(name)
            for other in graph[name]:
                visit(other)
            done.add(open_.pop())

    for name in graph:
        visit(name)


def _is_module(name):
    base = ROOT / "kernels" if name.startswith("dalle_kernels") else ROOT
    place = base.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_deepspeed_stays_in_its_room(path):
    inside = str(path.relative_to(ROOT)).removeprefix("dalle_dist/")
    users = {m.split(".")[0] for m in imports(path)}
    assert "deepspeed" not in users or inside.startswith(MAY_IMPORT_DEEPSPEED)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_files_fit_on_a_few_screens(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_signatures_are_typed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                continue  # its values have no Python types
            assert node.returns is not None, f"{path}:{node.lineno} {node.name} has no return type"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_nothing_is_unpickled_unchecked(path):
    for call in re.findall(r"torch\.load\((.*?)\)\n", path.read_text(), re.DOTALL):
        assert "weights_only=True" in call, f"{path}: torch.load({call})"
    assert "allow_pickle=True" not in path.read_text()


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_can_fail(path):
    words = ("assert", "raises", "fail", "warns", "run_distributed", "check", "refused")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            text = ast.unparse(node)
            assert any(word in text for word in words), f"{path}:{node.lineno} asserts nothing"


def test_tracked_files_name_no_machine():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    pattern = re.compile(r"/(?:home|root|work)/\w|pypi\.org|deb\.debian\.org")
    found = [
        name
        for name in tracked
        if Path(name).suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".json", ".sbatch", ".sh")
        and name != "tests/test_style.py"
        and pattern.search((ROOT / name).read_text())
    ]
    assert not found


# The field's standard terms are in the glossary of CONTRIBUTING.md.
OLD_WORDS = re.compile(r"\b(dialects?|own_line|mend|take_in|machine_groups|node_size|fragments?)\b")


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_words_are_those_of_the_glossary(path):
    allowed = "lp_fragment_address", "get_hp_fragment", "get_lp_grad_fragment", "fragment_address"
    text = path.read_text()
    for name in allowed:
        text = text.replace(name, "")
    assert not OLD_WORDS.findall(text.replace("tensor_fragment", ""))
