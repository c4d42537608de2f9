"""Infer: pin one model, prove its bytes and its device, predict every row of a batch once.

``pin`` resolves, ``cache`` proves, ``engine`` opens, ``flow`` predicts.
"""
