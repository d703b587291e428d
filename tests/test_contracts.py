"""The libraries have what is asked of them beyond their interfaces, and no more is asked than the contracts list."""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.convert.megatron.contract import CONTRACT as DISTRIBUTED_CHECKPOINTING
from megatrain.engine.zero.contract import CONTRACT as DEEPSPEED
from megatrain.parallel.contract import CONTRACT as PARALLEL
from tests.pool import Pool

ROOT = Path(__file__).parents[1]
CONTRACTS = {"engine": DEEPSPEED, "parallel": PARALLEL, "convert": DISTRIBUTED_CHECKPOINTING}
# of the standard library, and operators and hooks of torch, which the tests of their files call by themselves
ELSEWHERE = {
    "os._exit",
    "signal._HANDLER",
    "part._replace",
    "documents._replace",
    "config._attn_implementation",
    "torch._dynamo",
    "_ATEN._scaled_dot_product_flash_attention",
    "_ATEN._scaled_dot_product_flash_attention_for_cpu",
    "func._overloadpacket",
    "torch.utils._python_dispatch.TorchDispatchMode",
}
# what engine/zero calls objects of DeepSpeed; whatever it asks of them is listed, private or not
DEEPSPEEDS = {"self.optimizer", "optimizer", "self.deepspeed", "deepspeed", "self._scaler", "scaler", "mapping"}
WEIGHTS = {"parameter", "self.parameter", "weight", "persistent[0]"}
OF_TORCH = {*dir(torch.nn.Parameter), *dir(torch.optim.Optimizer), "param_groups", "state"}
DOCUMENTED = {"initialize", "init_distributed", "backward", "utils", "ops"}  # of DeepSpeed


def broken(contract: dict[str, str | None]) -> list[str]:
    """What the installed libraries do not keep of a contract."""
    problems = []
    for name, parameters in contract.items():
        if parameters is None:
            if not _is_set(name):
                problems.append(f"nothing sets {name}")
        elif not _fits(found := _parameters(_at(name)), parameters):
            problems.append(f"{name} has {found}, not {parameters}")
    return problems


def _module_of(name: str) -> tuple[Any, list[str]]:
    """The module that a dotted name begins with, and the rest of the name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            return importlib.import_module(".".join(parts[:end])), parts[end:]
        except ImportError:
            continue
    raise ImportError(name)


def _at(name: str) -> Any:
    value, rest = _module_of(name)
    for part in rest:
        value = getattr(value, part, None)
    return value


def _is_set(name: str) -> bool:
    """Whether it is there, or is made by an assignment or a definition in the module, which must have the class."""
    module, rest = _module_of(name)
    if _at(name) is not None or (len(rest) == 1 and hasattr(module, rest[0])):
        return True
    if len(rest) == 2 and not hasattr(module, rest[0]):
        return False
    return rest[-1] in _assigned(module)


@functools.cache
def _assigned(module: Any) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def _parameters(function: Any) -> str:
    if not callable(function):
        return "nothing to call"
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _fits(found: str, wanted: str) -> bool:
    head, more, _ = wanted.partition(", …")
    if not more:
        return found == wanted
    rest = found.removeprefix(head).removeprefix(", ").removesuffix(")")
    return found.startswith(head) and all("=" in part or part.startswith("*") for part in rest.split(", ") if part)


def asked(room: str, source: str, own: set[str]) -> Iterator[str]:
    """What ``source``, a file of ``room``, asks of others that is private, or DeepSpeed's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("megatrain"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if any(_is_private(part) for part in name.split(".")))
        if isinstance(node, ast.Attribute):
            owner, attribute = node.value, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            owner, attribute = node.args[0], str(name.value) if isinstance(name, ast.Constant) else "of a table"
        else:
            continue
        foreign = _is_private(attribute) and attribute not in own
        if attribute != "of a table" and room == "engine" and attribute not in OF_TORCH:
            of = ast.unparse(owner)
            foreign |= (of in DEEPSPEEDS and attribute not in DOCUMENTED) or (of in WEIGHTS and attribute not in own)
        if foreign:
            yield f"{ast.unparse(owner)}.{attribute}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(sources: list[str]) -> set[str]:
    """What the package itself defines or sets on ``self``."""
    names = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def all_broken() -> dict[str, list[str]]:
    from megatrain.engine.zero.import_once import import_deepspeed

    import_deepspeed()
    return {room: broken(contract) for room, contract in CONTRACTS.items()}


def test_the_installed_libraries_keep_the_contracts(pool: Pool) -> None:
    """In a worker, which has them imported; no group is asked for."""
    assert pool.run(all_broken, 1) == [{room: [] for room in CONTRACTS}]


def marks_as_libraries_read_them() -> None:
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.runtime.constants import PIPE_REPLICATED
    from deepspeed.runtime.utils import is_model_parallel_parameter
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    from megatrain.parallel.marks import mark

    whole, split, spread, copy = (torch.nn.Parameter(torch.zeros(2)) for _ in range(4))
    mark(split, tensor_dim=0)
    mark(spread, spread=True, expert_group="ep_size_2")
    mark(copy, counted_elsewhere=True)
    assert [is_model_parallel_parameter(p) for p in (whole, split, spread, copy)] == [False, True, False, False]
    assert [is_moe_param(p) for p in (whole, split, spread, copy)] == [False, False, True, False]
    assert spread.group_name == "ep_size_2"
    assert [getattr(p, PIPE_REPLICATED, False) for p in (whole, split, spread, copy)] == [False, False, False, True]
    rank_1 = torch.distributed.group.WORLD if torch.distributed.get_rank() else None
    assert param_is_not_tensor_parallel_duplicate(split, tp_group=rank_1)
    assert split.partition_dim == 0


def test_libraries_understand_the_marks(pool: Pool) -> None:
    pool.run(marks_as_libraries_read_them, 1)


def test_what_is_not_listed_is_not_asked_for() -> None:
    files = [path for folder in ("megatrain", "launch", "data_tools") for path in (ROOT / folder).rglob("*.py")]
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    own = own_names(list(sources.values()))
    unlisted = []
    for path, source in sources.items():
        room = path.relative_to(ROOT).parts[1]
        listed = {name.rpartition(".")[2] for name in CONTRACTS.get(room, {})}
        for name in asked(room, source, own):
            if name not in ELSEWHERE and name.rpartition(".")[2] not in listed:
                unlisted.append(f"{path.relative_to(ROOT)}: {name}")
    assert unlisted == [], "\n".join(unlisted)


def test_what_is_listed_is_asked_for() -> None:
    for room, contract in CONTRACTS.items():
        text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "megatrain" / room).rglob("*.py"))
        assert [name for name in contract if text.count(name.rpartition(".")[2]) < 2] == []


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ast.NodeVisitor.visit", "(self, knot)"),
        ("ast.NodeVisitor.gone", "(self)"),
        ("ast.NodeVisitor.gone", None),
        ("ast.Gone.visit", None),
        ("ast.NodeVisitor.visit", "(node, …)"),
        ("inspect.getdoc", "(…)"),
    ],
)
def test_a_broken_contract_is_seen(name: str, parameters: str | None) -> None:
    assert len(broken({name: parameters})) == 1


def test_a_kept_contract_passes() -> None:
    kept = {"ast.NodeVisitor.visit": "(self, node)", "ast.parse": "(source, filename='<unknown>', …)", "os.sep": None}
    assert broken(kept) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("engine", "self.optimizer.bit16_groups"),
        ("engine", "parameter.ds_id"),
        ("engine", "getattr(parameter, '_hp_grad', None)"),
        ("parallel", "schedule._prepare()"),
        ("models", "from torch._inductor import config"),
    ],
)
def test_a_contact_is_seen(room: str, source: str) -> None:
    assert len(list(asked(room, source, set()))) == 1
