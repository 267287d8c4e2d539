/* Whether modules are as they were when they were read: what Python takes longer to find out, between the layers of a
 * network, than a small layer takes.
 */
#include "_watch.h"

enum { REF, KIND, COUNT, METHODS, SETTINGS, HOOKS, REPLACED, ALTERED, CHILDREN }; /* a state, as `padfree.watch` makes it */

/* Whether these references, in this order, lead to these objects; what is no reference stands for itself. */
static int lead_to(PyObject *refs, PyObject *objects) {
    const size count = PyTuple_Size(refs);
    int same = PyObject_Size(objects) == count;
    for (size i = 0; same && i < count; i++) {
        PyObject *ref = PyTuple_GetItem(refs, i), *object = PySequence_GetItem(objects, i);
        PyObject *found = PyWeakref_Check(ref) ? PyWeakref_GetObject(ref) : ref;
        same = object != NULL && found == object && (found == ref || object != Py_None);
        Py_XDECREF(object);
    }
    return same;
}

/* Whether attributes of classes, each class followed by a name and its value, are the same objects still. */
static int has_methods(PyObject *facts) {
    int same = 1;
    for (size i = 0; same && i + 2 < PyTuple_Size(facts); i += 3) {
        PyObject *found = PyObject_GetAttr(PyTuple_GetItem(facts, i), PyTuple_GetItem(facts, i + 1));
        same = found == PyTuple_GetItem(facts, i + 2);
        Py_XDECREF(found);
    }
    return same;
}

/* The same of a dictionary's entries, each name followed by its value. */
static int has_settings(PyObject *own, PyObject *facts) {
    int same = 1;
    for (size i = 0; same && i + 1 < PyTuple_Size(facts); i += 2)
        same = PyDict_GetItemWithError(own, PyTuple_GetItem(facts, i)) == PyTuple_GetItem(facts, i + 1);
    return same;
}

/* Whether there are hooks, or attributes before what the class has by their names. */
static int is_altered(PyObject *own, PyObject *hooks, PyObject *names) {
    int found = 0;
    for (size i = 0; found == 0 && i < PyTuple_Size(hooks); i++) {
        PyObject *table = PyDict_GetItemWithError(own, PyTuple_GetItem(hooks, i));
        if (table != NULL) found = PyObject_IsTrue(table);
    }
    for (size i = 0; found == 0 && i < PyTuple_Size(names); i++)
        found = PyDict_GetItemWithError(own, PyTuple_GetItem(names, i)) != NULL;
    return found;
}

static int has_children(PyObject *own, PyObject *refs) {
    PyObject *table = PyDict_GetItemWithError(own, name._modules), *children;
    if (table == NULL || PyTuple_Size(refs) == 0) return table != NULL && PyObject_Size(table) == 0;
    children = PyMapping_Values(table);
    const int same = children != NULL && lead_to(refs, children);
    Py_XDECREF(children);
    return same;
}

static int is_as_read(PyObject *state) {
    PyObject *kind = PyTuple_GetItem(state, KIND), *module = PyWeakref_GetObject(PyTuple_GetItem(state, REF)), *own = NULL;
    if (module == NULL || (PyObject *)Py_TYPE(module) != kind) return 0;
    Py_INCREF(module); /* looking up attributes of a class may run code of its own */
    own = PyObject_GenericGetDict(module, NULL);
    const int same = own != NULL && PyDict_Size(own) == PyLong_AsSsize_t(PyTuple_GetItem(state, COUNT)) &&
                     has_settings(own, PyTuple_GetItem(state, SETTINGS)) &&
                     is_altered(own, PyTuple_GetItem(state, HOOKS), PyTuple_GetItem(state, REPLACED)) ==
                         (PyTuple_GetItem(state, ALTERED) == Py_True) &&
                     has_children(own, PyTuple_GetItem(state, CHILDREN)) && has_methods(PyTuple_GetItem(state, METHODS));
    Py_XDECREF(own);
    Py_DECREF(module);
    return same;
}

int unchanged(PyObject *watch, PyObject *modules) {
    PyObject *states = PyTuple_GetItem(watch, STATES);
    int same = lead_to(PyTuple_GetItem(watch, MODULES), modules) &&
               has_settings(PyTuple_GetItem(watch, NAMES), PyTuple_GetItem(watch, FUNCTIONS));
    for (size i = 0; same && i < PyTuple_Size(states); i++) same = is_as_read(PyTuple_GetItem(states, i));
    if (!PyErr_Occurred()) return same;
    if (PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear(); /* a class has lost a function, say */
    return 0;
}
