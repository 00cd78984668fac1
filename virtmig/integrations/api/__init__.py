"""`virtmig api`: HTTP over a unix socket or mutual TLS, one page, and metrics. Needs the extra `virtmig[api]`.

    serving.py    sockets, TLS and who may come in; uvicorn
    app.py        one function a request (Starlette)
    jobs.py       a migration is a process of its own, and its ticket is on the disk before it starts
    history.py    what the records say, read as they grow: every migration, whoever started it
    migrations.py a migration as the API shows it, in Nova's words
    actions.py    abort, postcopy, limits: libvirt calls on the source, with a deadline
    events.py     server-sent events from a record
    problems.py   every error as application/problem+json (RFC 9457)
    schema.py     the OpenAPI 3.1 document, made from the option table and the structs
    page/         the page: HTML, CSS and JavaScript, served from here alone

Nothing that the API does is on a guest's way: it reads records that a migration writes anyway, and when it is killed,
migrations go on and a new one shows them again. Importing this package imports nothing else.
"""
