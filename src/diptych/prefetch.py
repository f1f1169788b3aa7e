"""Work done a little ahead of whoever uses it: in threads, in order, and never further ahead than was allowed."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    ahead: int,
    prepare: Callable[[], object] | None = None,
) -> Generator[Result]:
    """Yield `function(item)` for every item, in the order of the items; at most `ahead` of them are under way or done.

    Items are taken by whoever iterates. `prepare` is called once in each thread. An exception comes out at its item's
    place; close the generator to stop the threads.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="diptych-ahead", initializer=prepare)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
