"""A local web page for one release: `dalle-dist serve RELEASE`.

verbs.py    the command
server.py   the socket, the model, the start and the end
app.py      what is answered at which address
guard.py    which requests are answered at all, and the headers of every answer
form.py     what a request asks for, checked before it waits
uploads.py  images out of what a client sent
line.py     the requests that wait, and the one that is carried out
worker.py   the one thread that has the model
page/       the page: HTML, CSS and JavaScript that need no build and no other host
"""
