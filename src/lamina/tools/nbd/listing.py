"""``-L``: what another server has to offer."""

from __future__ import annotations

from lamina.hints import TYPE_CHECKING
from lamina.tools.nbd.serving import credentials, server_address
from lamina.tools.tool import EXIT_OK
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.agreement import Description, Style

if TYPE_CHECKING:
    from lamina.tools.nbd.command import Settings
    from lamina.tools.tool import Tool

_FLAGS = {
    nbd.READ_ONLY: "readonly",
    nbd.SEND_FLUSH: "flush",
    nbd.SEND_FUA: "fua",
    nbd.ROTATIONAL: "rotational",
    nbd.SEND_TRIM: "trim",
    nbd.SEND_WRITE_ZEROES: "zeroes",
    nbd.SEND_DF: "df",
    nbd.CAN_MULTI_CONN: "multi",
    nbd.SEND_RESIZE: "resize",
    nbd.SEND_CACHE: "cache",
    nbd.SEND_FAST_ZERO: "fast-zero",
    nbd.BLOCK_STATUS_PAYLOAD: "block-status-payload",
}


def list_exports(tool: Tool, settings: Settings) -> int:
    from lamina.protocols.nbd.connecting import list_of_exports

    tls = credentials(tool, settings.tls_creds, "client")
    style, exports = list_of_exports(server_address(settings), tls, settings.tls_hostname)
    lines = [f"exports available: {len(exports)}"]
    for export in exports:
        lines += _described(export, style)
    print("\n".join(lines))
    return EXIT_OK


def _described(export: Description, style: Style) -> list[str]:
    lines = [f" export: '{export.name}'"]
    if export.text:
        lines.append(f"  description: {export.text}")
    if export.flags & nbd.HAS_FLAGS:
        words = "".join(f" {word}" for flag, word in _FLAGS.items() if export.flags & flag)
        lines += [f"  size:  {export.size}", f"  flags: 0x{export.flags:x} ({words} )"]
        if export.sizes_told:
            lines += [
                f"  min block: {export.sizes.minimum}",
                f"  opt block: {export.sizes.preferred}",
                f"  max block: {export.sizes.maximum}",
            ]
        width = "64-bit" if style is Style.EXTENDED else "32-bit"
        lines.append(f"  transaction size: {width}")
    if export.contexts:
        lines.append(f"  available meta contexts: {len(export.contexts)}")
        lines += [f"   {name}" for name in export.contexts]
    return lines
