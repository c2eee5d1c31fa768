"""What a file of a model holds, read before anything of it runs: tensors, known operations and sizes, or it is refused by name.

A program of torch.export is more than a graph: torch.export.load unpickles constants that say they are objects, evaluates the
expressions of symbolic sizes, opens shared libraries that lie in the archive, looks operations up by any dotted name below
`torch`, and writes names into Python code. A TorchScript file has code of its own, and that can read and write files. So both
are read here first, by torch's own reader, from the very bytes that are loaded afterwards: what is not on the lists below needs
`allow_code`. The lists say what is harmless, not what is harmful, so that what torch learns later is asked for, too.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NoReturn

import torch

from pysal._checks import first_line, refuse
from pysal.models.spec import WHERE, ModelSpec

# Operations of these libraries compute with tensors.
LIBRARIES = {"aten", "prim", "prims", "quantized", "quantized_decomposed", "torchvision"}
# But for these: memory that is not theirs, and whatever `_harmful` finds beside them.
HARMFUL = {"save", "from_file", "load", "set_", "set_data", "data_ptr"}
# And for those that change torch's settings in the process, or write wherever the indices or lengths they are given point to.
HARMFUL |= {"manual_seed", "set_grad_enabled", "segment_reduce", "ctc_loss"}
# Of the operations that torch keeps to itself, which check little, those that a traced or exported network is made of.
INTERNAL = set(
    "__and__ __contains__ __derive_index __getitem__ __iand__ __interpolate __ior__ __is__ __isnot__ __ixor__ __lshift__ "
    "__not__ __or__ __range_length __round_to_zero_floordiv __rshift__ __upsample __upsample_bilinear __upsample_nearest "
    "__xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _addmm_activation _assert_async _assert_scalar "
    "_assert_tensor_metadata _batch_norm_impl_index _cast_Float _cast_Half _cdist_forward _conj _convolution "
    "_convolution_mode _fft_c2c _fft_c2r _fft_r2c _functional_assert_async _functional_assert_scalar "
    "_fused_moving_avg_obs_fq_helper _fused_rms_norm _fused_sdp_choice _grouped_mm _indices _int_mm _local_scalar_dense "
    "_log_softmax _masked_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_native_multi_head_attention _nested_tensor_from_mask _nested_tensor_from_mask_left_aligned _pad_circular _pad_enum "
    "_prelu_kernel _reshape_copy _safe_softmax _scaled_dot_product_attention_math _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_fused_attention_overrideable _set_item _shape_as_tensor _softmax _stack _to_copy "
    "_transform_bias_rescale_qkv _transformer_encoder_layer_fwd _trilinear _unsafe_index _unsafe_masked_index _unsafe_view "
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d _values _version _weight_norm _weight_norm_interface".split()
)


class Foreign(Exception):
    """Something in a file that could do more than compute; the message names it."""


def check_program(spec: ModelSpec, content: bytes) -> None:
    """Refuse a program of torch.export that could do more than compute, unless code may run.

    Args:
        spec: what was asked for.
        content: of the file.

    Raises:
        PermissionError: names what was found.
        ValueError: the file is no archive of torch.
    """
    _check(spec, content, "a program of torch.export", _check_program)


def check_script(spec: ModelSpec, content: bytes) -> None:
    """Refuse a TorchScript file that could do more than compute, unless code may run; see `check_program`."""
    _check(spec, content, "a TorchScript file", _check_script)


def _check(spec: ModelSpec, content: bytes, kind: str, check: Any) -> None:
    if spec.allow_code:
        return
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(content))
        names = reader.get_all_records()
        check(reader, names)
    except Foreign as found:
        _refuse_code(kind, str(found), spec)
    except (RuntimeError, ValueError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        refuse(WHERE, "source", f"be {kind}", f"{spec.name} ({first_line(error)})")


def _refuse_code(kind: str, found: str, spec: ModelSpec) -> NoReturn:
    requirement = f"be True (--allow-code) for {kind} that holds more than tensors and operations on them"
    refuse(WHERE, "allow_code", requirement, f"False for {spec.source}, which has {found}", PermissionError)


def _shown(text: object) -> str:
    """Return a piece of a hostile file as it may stand in a sentence."""
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


# Operations ----------------------------------------------------------------------------------------------------------


@cache
def _harmful() -> frozenset[str]:
    """Return the names of operations that take the name of a file or check too little, as this torch knows them.

    Derivatives are among the second: they take the indices of a pooling, say, for what a pooling has returned.
    """
    found = set(HARMFUL)
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.split("::")[1]
        takes_a_file = any(
            str(argument.type) == "str" and re.search(r"file|path|url", argument.name) for argument in schema.arguments
        )
        if takes_a_file or name.endswith("_backward") or (name.startswith("_") and name not in INTERNAL):
            found.add(name)
    return frozenset(found)


# torch.export -------------------------------------------------------------------------------------------------------

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[\w.-]+|\.format_version|\.storage_alignment|models/[\w-]+\.json"
    r"|data/(weights|constants)/([\w-]+_config\.json|(weight|tensor)_\d+|[\w-]+\.pt)|data/sample_inputs/[\w-]+\.pt|extra/[\w./-]+"
)
_TARGETS = re.compile(
    r"torch\.ops\.(?P<library>\w+)\.(?P<op>\w+)(\.\w+)?"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond)"
    r"|torch\.sym_(int|float|not|max|min|ite|sum)|torch\._sym_sqrt|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
# Names that torch writes into the code of the modules it makes; the second kind it quotes.
_NAME = re.compile(r"[A-Za-z_]\w*|")
_DOTTED = re.compile(r"[\w.@ \-\[\]]*")
_NAMES = {"name", "as_name"}
_METADATA = re.compile(r"[\w.,;@ \-\[\]()'<>*:]*")
_SIZES = {
    *(
        "Symbol",
        "Integer",
        "Float",
        "Rational",
        "Add",
        "Mul",
        "Mod",
        "PythonMod",
        "Max",
        "Min",
        "FloorDiv",
        "CleanDiv",
        "CeilDiv",
    ),
    *(
        "IntTrueDiv",
        "ModularIndexing",
        "TruncToInt",
        "FloorToInt",
        "CeilToInt",
        "ToFloat",
        "Identity",
        "Where",
        "floor",
        "ceiling",
    ),
    *(
        "Equality",
        "Unequality",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
    ),
    *("And", "Or", "Not"),
}
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def _check_program(reader: Any, names: list[str]) -> None:
    for name in names:
        if not _RECORDS.fullmatch(name):
            raise Foreign(f"an entry {_shown(name)}")
    for name in names:
        if name.startswith("models/"):
            _check_json("", json.loads(reader.get_record(name)))
        elif name.endswith("_config.json"):
            for payload in json.loads(reader.get_record(name))["config"].values():
                # a tensor in a pickle is read as one all the same: by `tensors_only`
                if not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                    raise Foreign(f"a constant that is no tensor, {_shown(payload['path_name'])}")


def _check_json(key: str, value: Any) -> None:
    """Look at everything that a program says of itself."""
    if isinstance(value, list):
        for one in value:
            _check_json(key, one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if re.search(r"custom_obj|opaque", name) and one:
                raise Foreign(f"an object of its own, {_shown(one)}")
            if name in ("guards_code", "treespec_namedtuple_fields") and one:
                raise Foreign(f"{name}, {_shown(one)}")
            if name == "range_constraints":
                for symbol in one:
                    _check_size(symbol)
            elif not _DOTTED.fullmatch(name):
                raise Foreign(f"a name {_shown(name)}")
            _check_json(name, one)
    elif isinstance(value, str):
        _check_text(key, value)


def _check_text(key: str, text: str) -> None:
    if key == "expr_str":
        _check_size(text)
    elif key in ("target", "as_operator"):
        match = _TARGETS.fullmatch(text)
        if match is None or (match["op"] and (match["library"] not in LIBRARIES or match["op"] in _harmful())):
            raise Foreign(f"an operation {_shown(text)}")
    elif key in ("in_spec", "out_spec"):
        _check_tree(json.loads(text)[1])
    elif key in _NAMES:
        if not _NAME.fullmatch(text):
            raise Foreign(f"a name {_shown(text)}")
    elif key in ("nn_module_stack", "source_fn_stack", "torch_fn"):
        if not _METADATA.fullmatch(text):
            raise Foreign(f"a name {_shown(text)}")
    elif key not in ("stack_trace", "as_string", "custom", "from_node", "torch_version") and not _DOTTED.fullmatch(text):
        raise Foreign(f"a name {_shown(text)}")
    if "__enum__" in text:  # torch imports the module that such an entry names
        raise Foreign(f"a class of its own, {_shown(text)}")


def _check_tree(tree: Any) -> None:
    """Look at how a program's arguments are laid out; the class of a container is looked up by its name."""
    if tree["type"] not in _TREES:
        raise Foreign(f"a container {_shown(tree['type'])}")
    for child in tree["children_spec"]:
        _check_tree(child)


def _check_size(text: str) -> None:
    """Look at a symbolic size, which torch hands to sympy, which evaluates it as Python."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) < 10_000 else None
    except (SyntaxError, ValueError, MemoryError):
        tree = None
    if tree is None or not all(_is_arithmetic(node) for node in ast.walk(tree)):
        raise Foreign(f"a size {_shown(text)}")


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _SIZES
    if isinstance(node, ast.Name):
        return "__" not in node.id and (node.id in _SIZES or re.fullmatch(r"[a-z]+\d*|u\d+", node.id) is not None)
    if isinstance(node, ast.keyword):
        return node.arg in ("positive", "integer", "nonnegative", "nonzero", "real", "evaluate", "precision")
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return re.fullmatch(r"[A-Za-z]\w{0,40}|\d{1,20}(\.\d{1,20})?", node.value) is not None
        return isinstance(node.value, (bool, float)) or (isinstance(node.value, int) and abs(node.value) < 2**64)
    allowed = (
        *(
            ast.Expression,
            ast.Load,
            ast.BinOp,
            ast.UnaryOp,
            ast.Compare,
            ast.Add,
            ast.Sub,
            ast.Mult,
            ast.FloorDiv,
            ast.Div,
            ast.Mod,
        ),
        *(ast.USub, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    )
    return isinstance(node, allowed)


# TorchScript ---------------------------------------------------------------------------------------------------------

# What torch.jit.save writes; older formats say themselves which of their entries is code.
_SCRIPT_RECORDS = re.compile(
    r"code/.+\.py(\.debug_pkl)?|(data|constants|traced_inputs|bytecode|mobile_debug_handles\w*)(\.pkl|\.debug_pkl)|(data|constants|traced_inputs)/\d+"
    r"|version|byteorder|\.data/[\w.-]+|\.format_version|\.storage_alignment|extra/[\w./-]+"
)
_WORDS = re.compile(rb"[A-Za-z_]\w*")
_CALLS = re.compile(rb"\bops\s*\.\s*(\w+)\s*\.\s*(\w+)")
_CLASSES = re.compile(rb"torch\s*\.\s*classes\s*\.\s*(\w+)")


def _check_script(reader: Any, names: list[str]) -> None:
    for name in names:
        if not _SCRIPT_RECORDS.fullmatch(name):
            raise Foreign(f"an entry {_shown(name)}")
    for name in names:
        if not (name.startswith("code/") and name.endswith(".py")):
            continue
        text = reader.get_record(name)
        for library in (match[1].decode() for match in _CALLS.finditer(text)):
            if library not in LIBRARIES:
                raise Foreign(f"operations of {_shown(library)}")
        # Also inside strings: where one ends is for TorchScript's parser to say, and not every call has its brackets beside it.
        for word in (match[0].decode() for match in _WORDS.finditer(text)):
            if word in _harmful():
                raise Foreign(f"an operation {_shown(word)}")
    for name in names:
        if name.startswith("code/") or name.endswith(".pkl"):
            for match in _CLASSES.finditer(reader.get_record(name)):
                if match[1] not in (b"quantized", b"rnn"):
                    raise Foreign(f"objects of {_shown(match[1].decode())}")


def records(content: bytes) -> Iterator[str]:
    """Yield the names of the entries of an archive of torch; none where it is no such archive."""
    try:
        yield from torch._C.PyTorchFileReader(io.BytesIO(content)).get_all_records()
    except (RuntimeError, ValueError):
        return
