"""How a subcommand describes itself: what it is called with, and its help."""

from __future__ import annotations

from lamina.records import dataclass
from lamina.tools.arguments import Option, Parsed, WrongUsage, parse
from lamina.tools.tool import EXIT_OK, Exit, Tool


@dataclass(frozen=True)
class Command:
    usage: str
    """What follows the name of the command in its synopsis."""
    options: tuple[Option, ...]
    operands: tuple[tuple[str, str], ...] = ()
    """What is no option, each with an explanation."""

    def parse(self, arguments: list[str], tool: Tool) -> Parsed:
        """Raises what ``arguments.parse`` raises, and Exit after having shown the help."""
        given = parse(arguments, self.options, stop_at=("help",))
        if given.flag("help"):
            from lamina.tools.img import about

            about.show_command(tool, self.usage, self.options, self.operands)
            raise Exit(EXIT_OK)
        if given.flag("object"):
            from lamina.tools import objects

            for text in given.values("object"):
                objects.add_object(tool, text)
        return given


def image_name(given: Parsed) -> str:
    """The only operand. Raises WrongUsage if there is none or are others."""
    if len(given.operands) != 1:
        raise WrongUsage("Expecting one image file name")
    return given.operands[0]
