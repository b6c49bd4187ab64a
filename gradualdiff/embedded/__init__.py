"""A whole federation in this process: a broker and a store built in, and what each site sent."""
