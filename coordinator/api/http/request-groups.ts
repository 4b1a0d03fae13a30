/** Which requests the service has under the id that a client knows: a call with several prompts is several requests. */
export class RequestGroups {
  private readonly groups = new Map<string, readonly string[]>();

  async run<R>(id: string, requestIds: readonly string[], work: () => Promise<R>): Promise<R> {
    if (requestIds.length === 1 || this.groups.has(id)) return work(); // requests of the same ids are refused by the service
    this.groups.set(id, requestIds);
    try {
      return await work();
    } finally {
      this.groups.delete(id);
    }
  }

  idsOf(id: string): readonly string[] {
    return [id, ...(this.groups.get(id) ?? [])]; // another caller's request may have the id of this one's group
  }
}
