/** Which requests the service has under the id that a client knows: a call with several prompts is several requests. */
export class RequestGroups {
  private readonly groups = new Map<string, readonly string[]>();

  async run<R>(id: string, requestIds: readonly string[], work: () => Promise<R>): Promise<R> {
    if (requestIds.length === 1 || this.groups.has(id)) return work(); // a second call of the same id is refused by the service
    this.groups.set(id, requestIds);
    try {
      return await work();
    } finally {
      this.groups.delete(id);
    }
  }

  idsOf(id: string): readonly string[] {
    return this.groups.get(id) ?? [id];
  }
}
