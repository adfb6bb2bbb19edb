"""Starting, signalling and ending processes: a command never leaves processes behind.

A command (`signals`) that gets SIGTERM, SIGHUP or Ctrl-C unwinds like after an exception and ends every
process it has started (`ending`). Trainings run in a process group of their own (`group`) under a guard
(`guard`), which ends the group if the command is killed. Worker processes (`worker`) follow their parent.
"""
