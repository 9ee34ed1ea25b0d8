"""The Flower ClientApp: one node, one user, whose events stay here."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.device import Device, user_of
from client.handlers import handle_evaluate, handle_query, handle_train

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell the server which user lives on this node."""
    return handle_query([message], [user_of(context)], Device.of(context))[0]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this user's events and reply with the update."""
    return handle_train([message], [user_of(context)], Device.of(context))[0]


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Rank this user's held-out item with the global model and reply with its rank."""
    return handle_evaluate([message], [user_of(context)], Device.of(context))[0]
