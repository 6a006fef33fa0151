"""`dalle-dist overlap`: which images of an evaluation set lie in the training set too (paper 3.2).

job.py      the lookup on any number of ranks, cut off or not
images.py   a set of images: its readable ones, block by block
found.py    what a lookup found, and the files that keep it
outputs.py  the table, and the keys that do not overlap
page.py     report.html, by which a person chooses the threshold
pairs.py    pairs of images side by side
verbs.py    the verb
"""
