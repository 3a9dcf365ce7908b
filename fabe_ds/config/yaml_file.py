"""YAML files, of which no key may stand there twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Takes no key twice: of two, the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is there twice", key.start_mark
                )
            names.add(key.value if isinstance(key.value, str) else "")
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Any:
    """The value in a YAML file. Raises: OSError; ValueError, which says where and what is wrong."""
    return yaml_value(file.read_bytes())


def yaml_value(data: bytes) -> Any:
    """The value of YAML, UTF-8. Raises: ValueError, which says where and what is wrong."""
    try:
        return yaml.load(data.decode("utf-8-sig"), _Loader)  # noqa: S506 - it is safe
    except UnicodeDecodeError:
        raise ValueError(": not UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ValueError(f"{place}: {getattr(error, 'problem', None) or 'not YAML'}") from None
    except RecursionError:
        raise ValueError(": nested too deep") from None
    except Exception as error:  # of a value that is not of the type that it is said to be
        raise ValueError(f": {error}") from None
