/* A PKCS#11 v2.40 module that hands all calls on to a SoftHSM2 of its own, except where its folder says otherwise.
 *
 * In the folder that this file was loaded from are
 *   libsofthsm2.so  a copy: two modules in one process would share the state of the system's library
 *   softhsm2.conf   its configuration
 *   orders          which tokens there are, and what is to go wrong: read anew at each call, replaced in one go
 *   log             what was called and what came of it, as softhsm.py reads it
 *   tries/SERIAL    how many PIN tries are left; without the file, all
 * As with SoftHSM, calls may come from several threads, but one at a time. Nothing here makes them do so: those that
 * overlap are recorded, and what is kept for one call is kept by thread.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

/* CK_ULONG, CK_RV, handles and pointers all have the width of a register on Linux; CK_BBOOL comes in one. */
typedef unsigned long Word;
struct Attribute { Word type; unsigned char *value; Word length; };
struct SlotInfo { char description[64], manufacturer[32]; Word flags; };
struct TokenInfo { char label[32], manufacturer[32], model[16], serial[16]; Word flags; };  /* its beginning */
struct SessionInfo { Word slot, state, flags, error; };

enum {
    OK = 0, SLOT_ID_INVALID = 0x3, GENERAL_ERROR = 0x5, FUNCTION_FAILED = 0x6, SENSITIVE = 0x11, TYPE_INVALID = 0x12,
    DEVICE_REMOVED = 0x32, CANCELED = 0x50, MECHANISM_INVALID = 0x70, PIN_INCORRECT = 0xA0, PIN_LOCKED = 0xA4,
    SESSION_HANDLE_INVALID = 0xB3, TOKEN_NOT_PRESENT = 0xE0, BUFFER_TOO_SMALL = 0x150,
};
enum { SLOT_TOKEN_PRESENT = 1, SLOT_REMOVABLE = 2 };
enum { PIN_COUNT_LOW = 0x10000, PIN_FINAL_TRY = 0x20000, PIN_LOCKED_FLAG = 0x40000 };
enum { CLASS = 0x0, VALUE = 0x11, SECRET_KEY = 4, SECURITY_OFFICER = 0, SECURITY_OFFICER_STATE = 4 };
enum { TOKENS = 16, FAULTS = 64, FORGED = 1024, SESSIONS = 1024, LONGEST = 1 << 16 };

/* What a function's first arguments are: a slot; a session; a session and a mechanism; something else. */
enum Kind { OTHER, SLOT, SESSION, MECHANISM };
#define FUNCTIONS(F) \
    F(C_Initialize, OTHER) F(C_Finalize, OTHER) F(C_GetInfo, OTHER) F(C_GetFunctionList, OTHER) \
    F(C_GetSlotList, OTHER) F(C_GetSlotInfo, SLOT) F(C_GetTokenInfo, SLOT) F(C_GetMechanismList, SLOT) \
    F(C_GetMechanismInfo, SLOT) F(C_InitToken, SLOT) F(C_InitPIN, SESSION) F(C_SetPIN, SESSION) \
    F(C_OpenSession, SLOT) F(C_CloseSession, SESSION) F(C_CloseAllSessions, SLOT) F(C_GetSessionInfo, SESSION) \
    F(C_GetOperationState, SESSION) F(C_SetOperationState, SESSION) F(C_Login, SESSION) F(C_Logout, SESSION) \
    F(C_CreateObject, SESSION) F(C_CopyObject, SESSION) F(C_DestroyObject, SESSION) F(C_GetObjectSize, SESSION) \
    F(C_GetAttributeValue, SESSION) F(C_SetAttributeValue, SESSION) F(C_FindObjectsInit, SESSION) \
    F(C_FindObjects, SESSION) F(C_FindObjectsFinal, SESSION) F(C_EncryptInit, MECHANISM) F(C_Encrypt, SESSION) \
    F(C_EncryptUpdate, SESSION) F(C_EncryptFinal, SESSION) F(C_DecryptInit, MECHANISM) F(C_Decrypt, SESSION) \
    F(C_DecryptUpdate, SESSION) F(C_DecryptFinal, SESSION) F(C_DigestInit, MECHANISM) F(C_Digest, SESSION) \
    F(C_DigestUpdate, SESSION) F(C_DigestKey, SESSION) F(C_DigestFinal, SESSION) F(C_SignInit, MECHANISM) \
    F(C_Sign, SESSION) F(C_SignUpdate, SESSION) F(C_SignFinal, SESSION) F(C_SignRecoverInit, MECHANISM) \
    F(C_SignRecover, SESSION) F(C_VerifyInit, MECHANISM) F(C_Verify, SESSION) F(C_VerifyUpdate, SESSION) \
    F(C_VerifyFinal, SESSION) F(C_VerifyRecoverInit, MECHANISM) F(C_VerifyRecover, SESSION) \
    F(C_DigestEncryptUpdate, SESSION) F(C_DecryptDigestUpdate, SESSION) F(C_SignEncryptUpdate, SESSION) \
    F(C_DecryptVerifyUpdate, SESSION) F(C_GenerateKey, MECHANISM) F(C_GenerateKeyPair, MECHANISM) \
    F(C_WrapKey, MECHANISM) F(C_UnwrapKey, MECHANISM) F(C_DeriveKey, MECHANISM) F(C_SeedRandom, SESSION) \
    F(C_GenerateRandom, SESSION) F(C_GetFunctionStatus, SESSION) F(C_CancelFunction, SESSION) \
    F(C_WaitForSlotEvent, OTHER)
#define NUMBER(name, kind) N_##name,
#define NAME(name, kind) #name,
#define KIND(name, kind) kind,
enum Number { FUNCTIONS(NUMBER) COUNT };
static const char *const names[] = {FUNCTIONS(NAME)};
static const enum Kind kinds[] = {FUNCTIONS(KIND)};

typedef Word Function(Word, Word, Word, Word, Word, Word, Word, Word);
struct FunctionList { unsigned char major, minor; Function *functions[COUNT]; };

struct Token {
    char serial[17];  /* SoftHSM's, which names the token here */
    char label[33], shown_serial[17];
    long slot, present, generation, tries, position;  /* the generation changes whenever it is pulled */
    int loaded;  /* whether this process's SoftHSM has it, in real_slot, as of generation `seen` */
    Word real_slot;
    long seen;
};
struct Session { Word handle; struct Token *token; long generation; };
struct Fault { char kind[8], function[32]; long number, id; };
struct Forged { Word type, length; unsigned char value[FORGED]; };

static char folder[PATH_MAX];
static struct FunctionList *real;
static int initialized;
static struct Token tokens[TOKENS];
static struct Session sessions[SESSIONS];
static unsigned next_session;
static struct { long id, calls; } counters[FAULTS];
static __thread struct {  /* the orders as read last; those about tokens are in `tokens` */
    int faults, forged, hidden;
    long touch, touches, by;  /* milliseconds to wait, or -1; how often it was touched; bytes more or less */
    char secret;  /* 'w'rong, 's'hort, 'l'ong */
    struct Fault fault[FAULTS];
    struct Forged forge[8];
    Word hide[32];
} orders;

static Word forward(enum Number n, const Word *a)
{
    return real->functions[n](a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
}

static const char *inside(const char *name)
{
    static __thread char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void record(const char *format, ...)
{
    /* The time since boot tells this process from a later one with its number. */
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    char line[160];
    int length = snprintf(line, sizeof line, "%d %lld ", (int)getpid(), now.tv_sec * 1000LL + now.tv_nsec / 1000000);
    va_list values;
    va_start(values, format);
    length += vsnprintf(line + length, sizeof line - length, format, values);
    va_end(values);
    int file = open(inside("log"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || write(file, line, length) != length)
        dprintf(STDERR_FILENO, "simulated token: no log in %s\n", folder);
    if (file >= 0)
        close(file);
}

/* Orders. Bytes come as hexadecimal digits behind an x, so that no bytes are a word, too. */

static Word unhex(const char *text, unsigned char *bytes, Word room)
{
    Word n = 0;
    for (text++; n < room && sscanf(text, "%2hhx", &bytes[n]) == 1; text += 2)
        n++;
    return n;
}

static int order_token(const char *line, long position)
{
    struct Token read = {0}, *token = tokens;
    char label[66], shown[34];
    if (sscanf(line, "token %16s %ld %ld %ld %ld %65s %33s", read.serial, &read.slot, &read.present, &read.generation,
               &read.tries, label, shown) != 7)
        return 0;
    while (token < tokens + TOKENS && *token->serial && strcmp(token->serial, read.serial))
        token++;
    if (token == tokens + TOKENS)
        return 0;
    unhex(label, (unsigned char *)read.label, 32);
    unhex(shown, (unsigned char *)read.shown_serial, 16);
    read.position = position;
    read.loaded = token->loaded, read.real_slot = token->real_slot, read.seen = token->seen;
    *token = read;
    return 1;
}

static int order(const char *line)
{
    struct Fault *fault = &orders.fault[orders.faults];
    struct Forged *forged = &orders.forge[orders.forged];
    static __thread char bytes[2 * FORGED + 2];
    if (orders.faults < FAULTS
        && sscanf(line, "fault %7s %31s %ld %ld", fault->kind, fault->function, &fault->number, &fault->id) == 4)
        orders.faults++;
    else if (orders.forged < 8 && sscanf(line, "forge %lu %2049s", &forged->type, bytes) == 2)
        forged->length = unhex(bytes, forged->value, FORGED), orders.forged++;
    else if (orders.hidden < 32 && sscanf(line, "hide %lu", &orders.hide[orders.hidden]) == 1)
        orders.hidden++;
    else
        return sscanf(line, "secret %c %ld", &orders.secret, &orders.by) == 2
               || sscanf(line, "touch %ld", &orders.touch) == 1 || sscanf(line, "touches %ld", &orders.touches) == 1;
    return 1;
}

/* Read the orders, and close what was open on tokens that were pulled since. */
static int obey(void)
{
    static __thread char line[2 * FORGED + 64];
    FILE *file = fopen(inside("orders"), "re");
    int understood = file != NULL;
    memset(&orders, 0, sizeof orders);
    orders.touch = -1;
    for (long position = 0; understood && fgets(line, sizeof line, file); position++)
        understood = order_token(line, position) || order(line);
    if (file)
        fclose(file);
    if (!understood)
        dprintf(STDERR_FILENO, "simulated token: cannot read the orders in %s\n", folder);
    for (struct Token *token = tokens; initialized && token < tokens + TOKENS; token++)
        if (token->loaded && token->seen != token->generation) {
            forward(N_C_CloseAllSessions, (Word[8]){token->real_slot});
            token->seen = token->generation;
        }
    return understood;
}

/* Faults in time. */

static void sleep_for(long milliseconds)
{
    struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    while (nanosleep(&left, &left)) {}  /* a handled signal does not shorten it */
}

static long count(long id)
{
    long i = id % FAULTS;
    if (counters[i].id != id)
        counters[i].id = id, counters[i].calls = 0;
    return ++counters[i].calls;
}

static const struct Fault *fault_of(enum Number n, const char *kind, const struct Fault *after)
{
    for (const struct Fault *f = after ? after + 1 : orders.fault; f < orders.fault + orders.faults; f++)
        if (!strcmp(f->kind, kind) && (!strcmp(f->function, "*") || !strcmp(f->function, names[n])))
            return f;
    return NULL;
}

static void meet_fate(enum Number n)
{
    for (const struct Fault *f = NULL; (f = fault_of(n, "crash", f));)
        if (count(f->id) == f->number) {
            volatile char *volatile nowhere = NULL;
            *nowhere = 0;
        }
    for (const struct Fault *f = NULL; (f = fault_of(n, "hang", f));)
        if (count(f->id) == f->number)
            for (;;)
                pause();
    for (const struct Fault *f = NULL; (f = fault_of(n, "slow", f));)
        sleep_for(f->number);
}

static Word await_touch(const struct Token *token)
{
    long before = orders.touches, generation = token ? token->generation : 0, waited = 0;
    Word answer = OK;
    record("awaiting\n");
    for (; orders.touch >= 0 && orders.touches == before && answer == OK; waited += 10) {
        if (waited >= orders.touch)
            answer = CANCELED;
        else if (sleep_for(10), !obey())
            answer = GENERAL_ERROR;
        else if (token && token->generation != generation)
            answer = DEVICE_REMOVED;
    }
    record("awaited\n");
    return answer;
}

/* Slots, tokens and sessions. */

/* The token in a slot; where there is none, the one that was pulled from it last, for the slot itself remains. */
static struct Token *token_in(Word slot)
{
    struct Token *found = NULL;
    for (struct Token *t = tokens; t < tokens + TOKENS; t++)
        if (t->loaded && (Word)t->slot == slot && (!found || t->present > found->present))
            found = t;
    return found;
}

static void find_tokens(void)
{
    Word slots[4 * TOKENS], n = 4 * TOKENS;
    struct { struct TokenInfo info; char rest[256]; } real_one;
    memset(sessions, 0, sizeof sessions);
    for (struct Token *t = tokens; t < tokens + TOKENS; t++)
        t->loaded = 0;
    if (forward(N_C_GetSlotList, (Word[8]){0, (Word)slots, (Word)&n}) != OK)
        return;
    for (Word i = 0; i < n; i++)
        for (struct Token *t = tokens; t < tokens + TOKENS; t++)
            if (*t->serial && forward(N_C_GetTokenInfo, (Word[8]){slots[i], (Word)&real_one}) == OK
                && !memcmp(real_one.info.serial, t->serial, 16))
                t->loaded = 1, t->real_slot = slots[i], t->seen = t->generation;
}

static struct Session *session_of(Word handle)
{
    for (struct Session *s = sessions; s < sessions + SESSIONS; s++)
        if (s->token && s->handle == handle)
            return s;
    return NULL;
}

static void open_session(Word handle, struct Token *token)
{
    sessions[next_session++ % SESSIONS] = (struct Session){handle, token, token->generation};
    record("opened %s %ld %lu\n", token->serial, token->generation, handle);
}

static void close_session(struct Session *session)
{
    record("closed %s %ld %lu\n", session->token->serial, session->generation, session->handle);
    session->token = NULL;
}

static void pad(char *field, int width, const char *text)
{
    memset(field, ' ', width);
    memcpy(field, text, strnlen(text, width));
}

static Word deliver_list(const Word *found, Word n, Word *to, Word *room)
{
    Word had = *room;
    *room = n;
    if (to && had < n)
        return BUFFER_TOO_SMALL;
    if (to)
        memcpy(to, found, n * sizeof *to);
    return OK;
}

static Word slot_list(int with_token, Word *to, Word *room)
{
    Word found[TOKENS], n = 0;
    for (long position = 0; position < TOKENS; position++)
        for (struct Token *t = tokens; t < tokens + TOKENS; t++)
            if (t->loaded && t->position == position && token_in(t->slot) == t && (t->present || !with_token))
                found[n++] = t->slot;
    return room ? deliver_list(found, n, to, room) : FUNCTION_FAILED;
}

static int hidden(Word mechanism)
{
    for (int i = 0; i < orders.hidden; i++)
        if (orders.hide[i] == mechanism)
            return 1;
    return 0;
}

static Word mechanism_list(Word slot, Word *to, Word *room)
{
    Word found[512], n = 512, kept = 0;
    Word answer = forward(N_C_GetMechanismList, (Word[8]){slot, (Word)found, (Word)&n});
    for (Word i = 0; answer == OK && i < n; i++)
        if (!hidden(found[i]))
            found[kept++] = found[i];
    return answer == OK && room ? deliver_list(found, kept, to, room) : answer;
}

/* PINs. */

static int open_tries(const struct Token *token, long *left)
{
    char name[32], text[16] = "";
    snprintf(name, sizeof name, "tries/%s", token->serial);
    int file = open(inside(name), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0)
        return -1;
    flock(file, LOCK_EX);
    *left = pread(file, text, sizeof text - 1, 0) > 0 ? atol(text) : token->tries;
    return file;
}

static void write_tries(int file, long left)
{
    char text[16];
    int length = snprintf(text, sizeof text, "%ld\n", left);
    if (ftruncate(file, 0) || pwrite(file, text, length, 0) != length)
        dprintf(STDERR_FILENO, "simulated token: cannot count PIN tries in %s\n", folder);
}

static Word try_pin(enum Number n, const Word *a, const struct Token *token)
{
    long left = 0;
    int file = open_tries(token, &left);
    Word answer = file < 0 ? GENERAL_ERROR : PIN_LOCKED;
    if (file >= 0 && left > 0) {
        write_tries(file, left - 1);  /* before the PIN is tried, as tokens do: killing us gives no free try */
        answer = forward(n, a);
        if (answer != PIN_INCORRECT)
            write_tries(file, answer == OK ? token->tries : left);
    }
    if (file >= 0)
        close(file);
    return answer;
}

static Word token_info(const Word *a, const struct Token *token)
{
    struct TokenInfo *info = (struct TokenInfo *)a[1];
    Word answer = forward(N_C_GetTokenInfo, a);
    if (answer != OK)
        return answer;
    long left = 0;
    close(open_tries(token, &left));
    pad(info->label, sizeof info->label, token->label);
    pad(info->serial, sizeof info->serial, token->shown_serial);
    info->flags &= ~(Word)(PIN_COUNT_LOW | PIN_FINAL_TRY | PIN_LOCKED_FLAG);
    info->flags |= (left < token->tries ? PIN_COUNT_LOW : 0) | (left == 1 ? PIN_FINAL_TRY : 0)
                   | (left < 1 ? PIN_LOCKED_FLAG : 0);
    return OK;
}

/* Lies. */

static Word altered(unsigned char *bytes, Word n)
{
    Word by = orders.by;
    if (orders.secret == 'w' && n)
        bytes[0] ^= 1;
    if (orders.secret == 's')
        return n < by ? 0 : n - by;
    if (orders.secret == 'l')
        memset(bytes + n, 0xA5, by), n += by;
    return n;
}

static Word decrypt(const Word *a)
{
    unsigned char plain[LONGEST], *to = (unsigned char *)a[3];
    Word *room = (Word *)a[4], n = sizeof plain - orders.by;
    if (!to) {
        Word answer = forward(N_C_Decrypt, a);
        *room += answer == OK && orders.secret == 'l' ? orders.by : 0;
        return answer;
    }
    Word had = *room, answer = forward(N_C_Decrypt, (Word[8]){a[0], a[1], a[2], (Word)plain, (Word)&n});
    if (answer != OK)
        return answer;
    *room = altered(plain, n);
    if (had < *room)
        return BUFFER_TOO_SMALL;
    memcpy(to, plain, *room);
    return OK;
}

static const struct Forged *forged_as(Word type)
{
    for (int i = 0; i < orders.forged; i++)
        if (orders.forge[i].type == type)
            return &orders.forge[i];
    return NULL;
}

static Word read_attribute(Word session, Word object, struct Attribute *attribute)
{
    unsigned char bytes[LONGEST];
    Word class = 0;
    struct Attribute kind = {CLASS, (unsigned char *)&class, sizeof class};
    struct Attribute own = {attribute->type, bytes, sizeof bytes - orders.by};
    const struct Forged *forged = forged_as(attribute->type);
    int alter = orders.secret && attribute->type == VALUE
                && forward(N_C_GetAttributeValue, (Word[8]){session, object, (Word)&kind, 1}) == OK
                && class == SECRET_KEY;
    if (!forged && !alter)
        return forward(N_C_GetAttributeValue, (Word[8]){session, object, (Word)attribute, 1});
    Word answer = forward(N_C_GetAttributeValue, (Word[8]){session, object, (Word)&own, 1});
    Word room = attribute->length, n = answer != OK ? (Word)-1 : forged ? forged->length : altered(bytes, own.length);
    attribute->length = n;
    if (answer != OK || !attribute->value)
        return answer;
    if (room < n) {
        attribute->length = -1;
        return BUFFER_TOO_SMALL;
    }
    memcpy(attribute->value, forged ? forged->value : bytes, n);
    return OK;
}

static Word read_attributes(const Word *a)
{
    struct Attribute *template = (struct Attribute *)a[2];
    Word worst = OK;
    for (Word i = 0; template && i < a[3]; i++) {
        Word answer = read_attribute(a[0], a[1], &template[i]);
        if (answer != OK && answer != SENSITIVE && answer != TYPE_INVALID && answer != BUFFER_TOO_SMALL)
            return answer;
        worst = answer != OK ? answer : worst;
    }
    return worst;
}

/* A search finds an object by its forged attribute, and not by its true one. */
static Word find_objects(const Word *a)
{
    const struct Attribute *template = (struct Attribute *)a[1];
    struct Attribute asked[64];
    Word n = 0;
    if (a[2] > 64)
        return GENERAL_ERROR;
    for (Word i = 0; template && i < a[2]; i++) {
        const struct Forged *forged = forged_as(template[i].type);
        asked[n++] = template[i];
        if (forged && forged->length == template[i].length && !memcmp(forged->value, template[i].value, forged->length))
            n--;
        else if (forged)
            asked[n - 1].value = (unsigned char *)"", asked[n - 1].length = 0;
    }
    return forward(N_C_FindObjectsInit, (Word[8]){a[0], (Word)asked, n});
}

/* The calls. */

static Word handle(enum Number n, Word *a, struct Token *token, struct Session *session)
{
    struct SessionInfo info;
    Word answer = OK;
    switch (n) {
    case N_C_GetSlotInfo:
        if ((answer = forward(n, a)) == OK) {
            struct SlotInfo *slot = (struct SlotInfo *)a[1];
            char description[64];
            snprintf(description, sizeof description, "Simulated reader, slot %ld", token->slot);
            pad(slot->description, sizeof slot->description, description);
            slot->flags = (slot->flags & ~(Word)SLOT_TOKEN_PRESENT) | SLOT_REMOVABLE;
            slot->flags |= token->present ? SLOT_TOKEN_PRESENT : 0;
        }
        return answer;
    case N_C_GetTokenInfo:
        return token_info(a, token);
    case N_C_GetMechanismList:
        return mechanism_list(a[0], (Word *)a[1], (Word *)a[2]);
    case N_C_GetMechanismInfo:
        return hidden(a[1]) ? MECHANISM_INVALID : forward(n, a);
    case N_C_OpenSession:
        if ((answer = forward(n, a)) == OK)
            open_session(*(Word *)a[4], token);
        return answer;
    case N_C_CloseSession:
        if ((answer = forward(n, a)) == OK && session)
            close_session(session);
        return answer;
    case N_C_CloseAllSessions:
        if ((answer = forward(n, a)) == OK)
            for (struct Session *s = sessions; s < sessions + SESSIONS; s++)
                if (s->token == token)
                    close_session(s);
        return answer;
    case N_C_GetSessionInfo:
        if ((answer = forward(n, a)) == OK && token)
            ((struct SessionInfo *)a[1])->slot = token->slot;
        return answer;
    case N_C_Login:
    case N_C_Logout:
        answer = token && n == N_C_Login && a[1] != SECURITY_OFFICER ? try_pin(n, a, token) : forward(n, a);
        if (answer == OK && token)
            record("%s %s %ld\n", n == N_C_Login ? "in" : "out", token->serial, token->generation);
        return answer;
    case N_C_SetPIN:
        answer = forward(N_C_GetSessionInfo, (Word[8]){a[0], (Word)&info});
        return answer == OK && token && info.state != SECURITY_OFFICER_STATE ? try_pin(n, a, token) : forward(n, a);
    case N_C_InitPIN: {
        long left;
        int file = token ? open_tries(token, &left) : -1;
        if ((answer = forward(n, a)) == OK && file >= 0)
            write_tries(file, token->tries);
        close(file);
        return answer;
    }
    case N_C_GetAttributeValue:
        return orders.secret || orders.forged ? read_attributes(a) : forward(n, a);
    case N_C_FindObjectsInit:
        return orders.forged ? find_objects(a) : forward(n, a);
    case N_C_Decrypt:
        return orders.secret ? decrypt(a) : forward(n, a);
    default:
        return forward(n, a);
    }
}

static Word handle_other(enum Number n, const Word *a)
{
    /* SoftHSM is told where its configuration is for this moment only: another module may be in this process. */
    char *before = n == N_C_Initialize ? getenv("SOFTHSM2_CONF") : NULL;
    before = before ? strdup(before) : NULL;
    if (n == N_C_Initialize)
        setenv("SOFTHSM2_CONF", inside("softhsm2.conf"), 1);
    Word answer = forward(n, a);
    if (n == N_C_Initialize && before)
        setenv("SOFTHSM2_CONF", before, 1);
    else if (n == N_C_Initialize)
        unsetenv("SOFTHSM2_CONF");
    free(before);
    if (answer == OK && (n == N_C_Initialize || n == N_C_Finalize)) {
        initialized = n == N_C_Initialize;
        find_tokens();
        record("restarted\n");
    }
    return answer;
}

Word C_GetFunctionList(struct FunctionList **to);

/* A decryption that fails is over: the next one may begin. */
static Word failed(enum Number n, const Word *a, Word answer)
{
    unsigned char plain[LONGEST];
    Word room = sizeof plain;
    if (n == N_C_Decrypt && answer != BUFFER_TOO_SMALL)
        forward(n, (Word[8]){a[0], a[1], a[2], (Word)plain, (Word)&room});
    return answer;
}

static Word perform(enum Number n, Word *a)
{
    struct Session *session = NULL;
    struct Token *token = NULL;
    record("call %s\n", names[n]);
    if (!obey())
        return GENERAL_ERROR;
    meet_fate(n);
    if (!obey())  /* much may have happened meanwhile */
        return GENERAL_ERROR;
    const struct Fault *failure = fault_of(n, "fail", NULL);
    if (failure)
        return failed(n, a, failure->number);
    if (n == N_C_GetFunctionList)
        return C_GetFunctionList((struct FunctionList **)a[0]);
    if (initialized && n == N_C_GetSlotList)
        return slot_list(a[0] & 0xFF, (Word *)a[1], (Word *)a[2]);
    if (!initialized || kinds[n] == OTHER)
        return handle_other(n, a);
    if (kinds[n] == SLOT) {
        token = token_in(a[0]);
        if (!token || (!token->present && n != N_C_GetSlotInfo))
            return token ? TOKEN_NOT_PRESENT : SLOT_ID_INVALID;
        a[0] = token->real_slot;
    } else if ((session = session_of(a[0]))) {
        token = session->token;
        if (!token->present || session->generation != token->generation)
            return token->present ? SESSION_HANDLE_INVALID : DEVICE_REMOVED;
    }
    if (kinds[n] == MECHANISM && a[1] && hidden(*(Word *)a[1]))
        return MECHANISM_INVALID;
    if (orders.touch >= 0 && (n == N_C_DeriveKey || (n == N_C_Decrypt && a[3]))) {
        Word answer = await_touch(token);
        if (answer != OK)
            return failed(n, a, answer);
    }
    return handle(n, a, token, session);
}

static Word called(enum Number n, Word *a)
{
    static int running;
    static pid_t process;  /* a forked child has none of its parent's threads */
    if (process != getpid())
        process = getpid(), running = 0;
    if (__atomic_fetch_add(&running, 1, __ATOMIC_SEQ_CST))
        record("overlap %s\n", names[n]);
    Word answer = perform(n, a);
    __atomic_fetch_sub(&running, 1, __ATOMIC_SEQ_CST);
    return answer;
}

/* All take eight words, as many as the longest of them. That is sound on Linux's ABIs for x86-64, AArch64, i386 and
 * ARM: the caller removes arguments, so too many do no harm, and too few are read as garbage that is only passed on.
 */
#define TRAMPOLINE(name, kind) \
    static Word call_##name(Word a, Word b, Word c, Word d, Word e, Word f, Word g, Word h) \
    { \
        return called(N_##name, (Word[8]){a, b, c, d, e, f, g, h}); \
    }
#define ENTRY(name, kind) call_##name,
FUNCTIONS(TRAMPOLINE)
static struct FunctionList list = {2, 40, {FUNCTIONS(ENTRY)}};

__attribute__((visibility("default"))) Word C_GetFunctionList(struct FunctionList **to)
{
    if (!real) {
        Dl_info self;
        if (!dladdr((void *)&list, &self) || strlen(self.dli_fname) >= sizeof folder)
            return GENERAL_ERROR;
        strcpy(folder, self.dli_fname);
        char *slash = strrchr(folder, '/');
        *(slash ? slash : folder) = 0;
        void *library = dlopen(inside("libsofthsm2.so"), RTLD_NOW | RTLD_LOCAL);
        Word (*get)(struct FunctionList **);
        *(void **)&get = library ? dlsym(library, "C_GetFunctionList") : NULL;
        if (!get || get(&real) != OK) {
            dprintf(STDERR_FILENO, "simulated token: SoftHSM: %s\n", library ? "no functions" : dlerror());
            return GENERAL_ERROR;
        }
        list.major = real->major, list.minor = real->minor;
    }
    *to = &list;
    return OK;
}
