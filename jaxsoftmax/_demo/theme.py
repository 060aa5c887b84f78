"""Colours on light and on dark paper: pages and pictures follow the reader's system."""

# Each name with its colour on light and on dark paper. Pictures are drawn in the light colours, and
# colour-blind readers can tell the last three apart.
_COLOURS = {
    "ink": ("#1d2430", "#e9ebef"),
    "soft": ("#56606e", "#a9b2be"),
    "line": ("#e3e6ea", "#333b47"),
    "mute": ("#a3abb6", "#6c7684"),
    "paper": ("#fbfaf7", "#14181f"),
    "card": ("#ffffff", "#1c222b"),
    "blue": ("#0072b2", "#5bb3ea"),
    "orange": ("#d55e00", "#ff8f3f"),
    "green": ("#009e73", "#3fcb9c"),
}
_NOT_IN_PICTURES = ("paper", "card")
# The grey of `jaxsoftmax.plots`.
_ALIASES = {"#6b7380": "#56606e"}
INK, SOFT, LINE, MUTE = (_COLOURS[name][0] for name in ("ink", "soft", "line", "mute"))


def light(name: str) -> str:
    """Says which colour to draw in."""
    return _COLOURS[name][0]


def variable(name: str) -> str:
    """Says in CSS which colour a name has."""
    return f"var(--{name})"


def style() -> str:
    """Builds the CSS that gives each name its colour."""
    light, dark = (
        "".join(f"--{name}:{colours[side]};" for name, colours in _COLOURS.items())
        for side in (0, 1)
    )
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def themed(svg: str) -> str:
    """Makes an SVG picture follow the reader's system."""
    for alias, colour in _ALIASES.items():
        svg = svg.replace(alias, colour)
    for name, (colour, _) in _COLOURS.items():
        if name not in _NOT_IN_PICTURES:
            svg = svg.replace(colour, variable(name))
    head, start, rest = svg.partition("<svg")
    tag, end, body = rest.partition(">")
    return f"{head}{start}{tag}{end}<style>{style()}</style>{body}"
