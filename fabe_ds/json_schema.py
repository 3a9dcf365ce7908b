"""What a JSON schema describes: Arrow types, values made to fit them, the least value there is.

Source: JSON Schema 2020-12, "Validation" (type, enum, const) and "Applicator" keywords.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fabe_ds.fields import FieldPath

if TYPE_CHECKING:
    import pyarrow as pa

_SCALARS = ("string", "integer", "number", "boolean")
_DEPTH = 32


def column_type(schema: Mapping[str, Any] | None, key: FieldPath = ()) -> pa.DataType:
    """The type of a column of answers that follow a schema, or of a part of them. What has no one
    type of Arrow's is text: its JSON."""
    found: Any = schema or {}
    for step in key:
        found = _properties(found, schema or {}).get(str(step))
    return _type(found, schema or {}, 0)


def has_property(schema: Mapping[str, Any], key: FieldPath) -> bool:
    """Whether a schema describes a part of its objects by name."""
    found: Any = schema
    for step in key:
        found = _properties(found, schema).get(str(step))
        if found is None:
            return False
    return True


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """What a reference inside the schema leads to, and what is left beside `null`."""
    for _ in range(_DEPTH):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        options = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(reference, str) and reference.startswith("#"):
            schema = _pointed(root, reference[1:])
        elif isinstance(options, list):
            others = [one for one in options if one != {"type": "null"}]
            if len(others) != 1:
                return {}
            schema = others[0]
        elif isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
            schema = schema["allOf"][0]
        else:
            return schema
    return {}


def _pointed(root: Any, pointer: str) -> Any:
    for step in filter(None, pointer.split("/")):
        key = step.replace("~1", "/").replace("~0", "~")
        root = root.get(key) if isinstance(root, Mapping) else None
    return root


def _properties(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = _resolved(schema, root).get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _type(schema: Any, root: Mapping[str, Any], depth: int) -> pa.DataType:
    import pyarrow as pa

    scalars = dict(zip(_SCALARS, (pa.string(), pa.int64(), pa.float64(), pa.bool_()), strict=True))
    found = _resolved(schema, root)
    if depth > _DEPTH:  # a type that holds itself
        return pa.string()
    kind = found.get("type")
    if isinstance(kind, list):
        others = [one for one in kind if one != "null"]
        kind = others[0] if len(others) == 1 else None
    if kind in scalars:
        return scalars[kind]
    if kind == "array":
        return pa.list_(_type(found.get("items"), root, depth + 1))
    properties = found.get("properties")
    if kind == "object" and isinstance(properties, Mapping) and properties:
        return pa.struct([(name, _type(p, root, depth + 1)) for name, p in properties.items()])
    values = found.get("enum", [found["const"]] if "const" in found else [])
    kinds = {type(value) for value in values if value is not None}
    by_python = {str: "string", bool: "boolean", int: "integer", float: "number"}
    if len(kinds) == 1 and (name := by_python.get(kinds.pop())):
        return scalars[name]
    return pa.string()


def least(schema: Any, root: Mapping[str, Any] | None = None, depth: int = 0) -> Any:
    """A small value of the kind that a schema describes, for trying a run out without a model."""
    root = schema if root is None else root
    found = _resolved(schema, root)
    for key in ("default", "const"):
        if key in found:
            return found[key]
    if found.get("enum"):
        return found["enum"][0]
    kind = found.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    properties = found.get("properties")
    if isinstance(properties, Mapping) and depth < _DEPTH:
        return {name: least(inner, root, depth + 1) for name, inner in properties.items()}
    values = {"integer": 0, "number": 0, "boolean": False, "array": [], "object": {}, "null": None}
    if kind in ("integer", "number"):
        return found.get("minimum", 0)
    return values.get(str(kind), "")


def fitted(value: Any, kind: pa.DataType) -> Any:
    """A value as a column of a type holds it; None where it cannot."""
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_struct(kind):
        if not isinstance(value, Mapping):
            return None
        return {field.name: fitted(value.get(field.name), field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        is_list = isinstance(value, list)
        return [fitted(item, kind.value_type) for item in value] if is_list else None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if pa.types.is_integer(kind):
        whole = int(value)
        return whole if whole == value and -(2**63) <= whole < 2**63 else None
    return float(value)
