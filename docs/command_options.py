"""A directive that lists the options of a command from its parser.

Terminals wrap the help of argparse at their own width, and pages at theirs.
"""

import re
from argparse import SUPPRESS

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from tripletjax.cli.main import build_parser


class CommandOptions(SphinxDirective):
    """The options of a command in groups, or the commands without an argument."""

    optional_arguments = 1

    def run(self):
        parser = build_parser()
        (commands,) = parser._subparsers._group_actions
        if not self.arguments:
            return [_make_list(map(_describe_command, commands._choices_actions))]
        (name,) = self.arguments
        parser = commands.choices[name]
        content = [_make_paragraph(parser.description)]
        for group in parser._action_groups:
            actions = [x for x in group._group_actions if x.dest != "help"]
            if not actions:
                continue
            content.append(nodes.rubric("", group.title))
            content.append(_make_list(_describe(parser, x, name) for x in actions))
        if parser.epilog:
            content.append(_make_paragraph(parser.epilog))
        return content


def _describe_command(action):
    """A command with a link to its section, and its summary."""
    literal = nodes.literal(action.dest, action.dest)
    link = nodes.reference("", "", literal, refuri=f"#tripletjax-{action.dest}")
    return nodes.term("", "", link), action.help


def _describe(parser, action, command):
    """An option with an anchor for links, and its help."""
    formatter = parser._get_formatter()
    text = formatter._format_action_invocation(action)
    term = nodes.term("", "", nodes.literal(text, text))
    term["ids"] = [nodes.make_id(f"{command} {text.partition(' ')[0]}")]
    shown = action.help not in (None, SUPPRESS)
    return term, formatter._expand_help(action) if shown else ""


def _make_list(pairs):
    listing = nodes.definition_list()
    for term, text in pairs:
        definition = nodes.definition("", _make_paragraph(text))
        listing += nodes.definition_list_item("", term, definition)
    return listing


def _make_paragraph(text):
    """A paragraph in which options are literals, whose dashes stay as they are."""
    parts = re.split(r"(--[\w-]+)", " ".join(text.split()))
    paragraph = nodes.paragraph()
    for number, part in enumerate(parts):
        paragraph += nodes.literal(part, part) if number % 2 else nodes.Text(part)
    return paragraph


def setup(app):
    app.add_directive("command-options", CommandOptions)
    return {"parallel_read_safe": True}
