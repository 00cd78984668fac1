"""The command line. `virtmig --help` and completion import only what they show: no libvirt, lxml, rich or numpy.

main.py             virtmig [globals] COMMAND ...: start, dispatch, errors to stderr, exit status
global_options.py   what was asked before the command
grammar.py          virsh's grammar, read from a table of options, over click
manual.py           --help, `virtmig help`, and the man page, from the tables
completion.py       values for bash, zsh and fish: domain names, URIs, choices
commands.py         what each command does
display*.py         progress, as a person or a program wants it
"""
