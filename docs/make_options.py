"""Write ``options.md``: every driver's options, as the drivers themselves declare them.

    .venv/bin/python docs/make_options.py
"""

from __future__ import annotations

from pathlib import Path

from lamina.block import registry
from lamina.block.options import Type, specs
from lamina.records import fields

PAGE = Path(__file__).with_name("options.md")
INTRODUCTION = """\
# Options of all drivers

Made by `docs/make_options.py` from the drivers' own declarations. Runtime options are given as
`--image-opts driver=…,KEY=VALUE` or `json:{…}`; creation options as `-o KEY=VALUE`. Every node also
takes `node-name`, `read-only`, `auto-read-only`, `force-share`, `discard`, `detect-zeroes`,
`cache.direct` and `cache.no-flush`; drivers with no options but these are left out.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for name in registry.names():
        driver = registry.driver(name)
        tables = [("runtime", driver.Options), ("creation", driver.CreateOptions)]
        if not any(cls is not None and specs(cls) for _, cls in tables):
            continue
        parts.append(f"\n## {name}\n")
        for title, cls in tables:
            if cls is not None and specs(cls):
                parts.append(f"\n{title} option | type | default | meaning\n---|---|---|---\n")
                parts += [row(cls, field, spec) for field, spec in specs(cls).items()]
    return "".join(parts)


def row(cls: type, field: str, spec: object) -> str:
    default = next(one for one in fields(cls) if one.name == field).make_default()
    shown = "" if default is None else default
    if isinstance(default, bool):
        shown = "on" if default else "off"
    kind = ", ".join(spec.choices) if spec.choices else spec.type.value
    if spec.type is Type.BOOL:
        kind = "on, off"
    return f"`{spec.key}` | {kind} | {shown} | {spec.help}\n"


if __name__ == "__main__":
    PAGE.write_text(page())
