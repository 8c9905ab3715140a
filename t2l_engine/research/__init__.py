"""Training, evaluation and costs: what makes and judges hypernetworks, and is not needed to use one.

May be imported: ``tasks``, ``costs``, ``training``, ``evaluation``; the rooms of the engine never import this one.
"""
