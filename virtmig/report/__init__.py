"""What happened: every migration leaves a record; told, compared, replayed, and shown in one file.

records.py    the rows of a record, where records are, and how they are read
recorder.py   a record being written while the migration runs; it never hurts it
explain.py    a record in sentences; two beside each other; what another policy would have done
"""
