"""Pictures and words for people: grids, strips and GIFs by pillow; curves by matplotlib; the summary's paragraph.

``images`` and ``gif`` do without matplotlib, so that training and sampling need not wait for its import.
"""
