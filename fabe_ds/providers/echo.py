"""The record's own text under a one-line header: for trying a data set without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from fabe_ds.json_schema import least
from fabe_ds.providers.base import LocalProvider
from fabe_ds.request import Completion, Request

_STYLES = {
    "//": "c cpp c++ csharp java javascript js typescript ts go rust swift kotlin scala dart php",
    "--": "sql lua haskell ada elm vhdl",
    "%": "tex latex matlab erlang prolog",
    ";": "lisp clojure scheme asm assembly ini",
    "'": "vb vba basic",
    "!": "fortran",
}
_PREFIX = {name: prefix for prefix, names in _STYLES.items() for name in names.split()}
_PAIRS = {
    **dict.fromkeys(("html", "xml", "markdown", "md", "svg", "vue"), ("<!-- ", " -->")),
    **dict.fromkeys(("css", "scss", "less"), ("/* ", " */")),
    **dict.fromkeys(("ocaml", "pascal"), ("(* ", " *)")),
}


def comment(text: str, language: str) -> str:
    """The text as a one-line comment; `#` for languages that are not known."""
    language = language.lower()
    before, after = _PAIRS.get(language, (f"{_PREFIX.get(language, '#')} ", ""))
    return f"{before}{text}{after}"


class EchoProvider(LocalProvider):
    name = "echo"
    cached: ClassVar[bool] = False
    asks: ClassVar[bool] = False
    takes_forms = True

    def body(self, request: Request) -> dict[str, Any]:
        return {"model": self.endpoint.model, "text": request.text, "language": request.language}

    def _answer(self, request: Request, header: str) -> Completion:
        """The text under a header; where it must have a form, the least that has it."""
        form = request.form
        if form.choices:
            return Completion(form.choices[0], "stop")
        if form.schema is not None:
            return Completion(json.dumps(least(form.schema), ensure_ascii=False), "stop")
        return Completion(f"{header}\n{request.text}", "stop")

    def complete(self, requests: Sequence[Request]) -> list[Completion]:  # type: ignore[override]
        name = f"echo: {self.endpoint.model}"
        header = {language: comment(name, language) for language in {r.language for r in requests}}
        return [self._answer(request, header[request.language]) for request in requests]
