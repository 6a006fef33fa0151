"""`dalle-dist evaluate`: what a release is worth on a set that it was not trained on.

run.py          the evaluation from beginning to end, and the files that it writes
options.py      what a call asks for
subject.py      all that is evaluated and measured with, loaded and checked before anything is made
data.py         the set: its captions and images
rows.py         work on many images, shared by ranks, its results in one order
distances.py    Fréchet distances and inception scores of one feature network
tokenizer.py    figures of the image tokenizer
losses.py       losses per modality
samples.py      candidates of captions, and the best of the first n of them
generated.py    figures of generated images: rerank curves, blur, CLIP score, identification
figures.py      a figure with its setting; the table and the CSV
paper.py        the figures that the paper published
page.py         report.html

The measures themselves are in `dalle_dist/evaluation/`.
"""
