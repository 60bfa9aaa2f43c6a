"""Arguments to calls; a file for each kind of resource. Both clients build every request here.

Retried are reads, calls that do the same when repeated, and creates, whose request_id is made once and sent with each
attempt. Not retried are deleting and cancelling: a second attempt could report what the first one did as an error.
"""
