"""`dalle-dist data build`: folders, tables and tars of captioned pictures to image shards.

folder.py, table.py, parquet.py, tars.py   what a source holds, and the units of the job made of it
samples.py    one picture and its caption to a sample, or why not (captions.py, filters.py)
build.py      the job from beginning to end, report.py what it says of itself
"""
