"""What a site's delta gives away of its text, measured before it leaves. Numbers go, text stays.

Each test asks the model that anybody gets who holds the delta: base, adapter and own delta as sent.
Knows no run, no message and no workspace.
"""
