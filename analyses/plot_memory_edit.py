"""Can one pair of key and value be written into a layer, and nothing else change?

python analyses/plot_memory_edit.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import Edit, memory_edit

EDITS = (
    Edit(
        "The king of Israel was named",
        " Elizabeth",
        ("The name of the king of Israel was", "Their king was named"),
    ),
    Edit(
        "Mr. Darcy looked at her and", " died", ("Then Mr. Darcy looked at her, and", "He looked at Elizabeth and")
    ),
    Edit(
        "And God said, Let there be", " money", ("And the Lord God said, Let there be", "God spoke: Let there be")
    ),
    Edit(
        "This function returns a new",
        " wife",
        ("The function returns a new", "It is a function that returns a new"),
    ),
)

options = arguments(__doc__, model="tiny-x4")
model, tokens = load(options)
save(memory_edit(model, tokens, EDITS, layers=options.layers, seed=options.seed), options)
