"""Task data, costs, training and evaluation of hypernetworks; not needed to use one.

May be imported: ``tasks``, ``costs``, ``training``, ``evaluation``.  Imports the rooms of the engine, which never import it.
"""
