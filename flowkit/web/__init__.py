"""The web page of an application, ``flowkit web``: ``pages`` serves it, ``failed``, ``workers`` and ``recent`` find what it
shows. It needs the extra ``web``.
"""
