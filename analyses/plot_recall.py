"""Does width buy memory? Random facts are planted in small layers; no model is loaded.

python analyses/plot_recall.py [--seed S]
"""

from common import arguments, save

from ffnprobe import recall

options = arguments(__doc__)
options.model = "planted"  # the files' name
save(recall(seed=options.seed), options)
